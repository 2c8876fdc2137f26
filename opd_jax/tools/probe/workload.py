"""The models and problems of a probe, checked before any weights are loaded."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opd_jax import checkpoint, data, models, workdir
from opd_jax import config as configuration
from opd_jax.data.length_filter import prompt_misfit, teacher_misfit
from opd_jax.errors import ConfigError, DataError
from opd_jax.models import decoder
from opd_jax.sharding.mesh import ONE
from opd_jax.training.make_setup import make_setup
from opd_jax.training.roles import compute_dtype
from opd_jax.training.setup import Setup
from opd_jax.training.weights import load_weights


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked student, its teachers, and the problems.

    Attributes:
      setups: one for each teacher, with the same student in all.
      problems: the first problems that training would use, in the same order.
      folder, step: the run and step whose checkpoint is the student; None for the model folder.
      notes: the notes of the setups on vocabularies and data.
    """

    setups: list[Setup]
    problems: list[data.Problem]
    folder: pathlib.Path | None
    step: int | None
    notes: list[str]

    @property
    def config(self) -> ConfigDict:
        """The config of the first teacher; configs of the others differ only in section `teacher`."""
        return self.setups[0].config

    @property
    def drawn(self) -> np.ndarray:
        """Allowed-token mask of the student's rollouts: ids that every teacher can read; bool [V]."""
        return np.logical_and.reduce([setup.alignment.drawn for setup in self.setups])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The student's end tokens."""
        return self.setups[0].alignment.stop_ids


def config_of_run(folder: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return the config of a run, with the fields of `overrides` replaced.

    Fields that a run of an older version lacks have their defaults. Raises WorkdirError: no run.
    """
    kept = configuration.flatten(workdir.read_config(pathlib.Path(folder)))
    config = configuration.default()
    for field, default in configuration.flatten(config.to_dict()).items():
        value = kept.get(field, default)
        _set(config, field, tuple(value) if isinstance(default, tuple) else value)
    if config.teacher.follow != "frozen":
        config.teacher.path = "student"  # config.json has the resolved folder instead
    for field, value in overrides.items():
        _set(config, field, value)
    return config


def make_plan(
    config: ConfigDict,
    *,
    teachers: Sequence[str] = (),
    folder: str | None = None,
    step: int | None = None,
    need_answers: bool = False,
) -> Plan:
    """Read and check everything except the weights; see `run` for the arguments. Raises an OpdError."""
    if not folder and step is not None:
        raise ConfigError(
            f"step={step} needs a run, whose checkpoint it selects; give --workdir=DIR"
        )
    config = _for_probing(config)
    if folder:
        student = workdir.read_config(pathlib.Path(folder))["student"]
        for field in ("path", "rope_theta", "max_position", "chat_template", "enable_thinking"):
            config.student[field] = student.get(field, config.student[field])
        config.data.date = config.data.date or workdir.date_of(pathlib.Path(folder))
        if config.teacher.follow in ("average", "every"):
            raise ConfigError(
                f"teacher.follow={config.teacher.follow}: the moving average, or the copy, of a "
                "checkpoint's weights cannot be probed; set "
                "--config.teacher.follow=frozen or live"
            )
    if not (config.teacher.path or teachers):
        raise ConfigError(
            "teacher.path='' names no teacher to examine; set --config.teacher.path=DIR"
        )
    setups = []
    for path in teachers or [config.teacher.path]:
        config.teacher.path = path
        setups.append(_comparable(make_setup(config, ONE)))
    problems = _problems(setups, need_answers=need_answers)
    notes = list(dict.fromkeys(note for setup in setups for note in setup.notes))
    return Plan(setups, problems, pathlib.Path(folder) if folder else None, step, notes)


def load_student(plan: Plan) -> tuple[models.Params, int | None]:
    """Return the student in its compute dtype, and the step of its checkpoint, if any."""
    setup, config = plan.setups[0], plan.config
    dtype = compute_dtype(config.student.dtype)
    if plan.folder is None:
        return models.load(config.student.path, dtype=dtype)[1], None
    abstract = decoder.abstract_params(setup.student)
    step, params = checkpoint.restore_params(plan.folder, abstract, step=plan.step)
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params), step


def load_teacher(setup: Setup, student: models.Params) -> tuple[models.Params, models.Params]:
    """Return the teacher's weights in its own ids, and in the student's ids for scoring.

    Unless `teacher.follow` is frozen, the teacher is the student.
    """
    if setup.config.teacher.follow != "frozen":
        return student, student
    weights = load_weights(setup, student=False)
    assert weights.teacher is not None  # a plan has a teacher
    assert weights.scorer is not None
    return weights.teacher, weights.scorer


def _comparable(setup: Setup) -> Setup:
    """Return the setup. Raises ConfigError for a teacher with another tokenizer."""
    if setup.reader is not None:
        raise ConfigError(
            f"teacher {setup.config.teacher.path} has another tokenizer than the student, wanted the same: "
            "probes compare distributions over one vocabulary; a short training run logs score/span_* "
            "(docs/spans.md)"
        )
    return setup


def _for_probing(config: ConfigDict) -> ConfigDict:
    """Return a copy that needs rollouts and a teacher, and nothing else that training may need."""
    config = config.copy_and_resolve_references()
    config.loss = configuration.default().loss  # plain OPD: no reference, no golden solutions
    config.harness = configuration.default().harness
    config.teachers = configuration.default().teachers  # that of teacher.path is examined
    config.guard.action = "off"  # the guard may raise terms that need these
    config.eval.data = config.eval.best = ""
    config.data.epochs = 0.0
    return config


def _problems(setups: Sequence[Setup], *, need_answers: bool) -> list[data.Problem]:
    first, config = setups[0], setups[0].config
    count = min(config.probe.problems, len(first.train))
    batches = data.make_batches(
        first.train, batch=count, seed=config.seed, shuffle=config.data.shuffle
    )
    problems = next(batches)
    unanswered = [problem.id for problem in problems if not problem.answer]
    if need_answers and unanswered:
        raise DataError(
            f"data.train: problem {unanswered[0]} has no answer, but the probe needs one for every problem; "
            "set --config.data.train to a file with answers"
        )
    for setup in setups:  # the setups checked only the first of generated problems
        _require_room(setup, problems)
    return problems


def _require_room(setup: Setup, problems: Sequence[data.Problem]) -> None:
    """Check that both models' prompts fit with a complete response, and so with every prefix of one."""
    rollout = setup.config.rollout
    student_prompts = setup.student_style.prompts(problems, setup.tokenizer)
    teacher_prompts = setup.teacher_style.prompts(problems, setup.teacher_tokenizer)
    for problem, student_ids, teacher_ids in zip(
        problems, student_prompts, teacher_prompts, strict=True
    ):
        assert setup.teacher is not None  # _for_probing
        misfit = prompt_misfit(len(student_ids), rollout.max_prompt_tokens)
        misfit = misfit or teacher_misfit(
            len(teacher_ids), setup.teacher.max_position, rollout.max_response_tokens
        )
        if misfit:
            path = setup.config.teacher.path
            raise DataError(f"data.train: problem {problem.id}: {misfit[1]} (teacher {path})")


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():  # `validate` reports a wrong type more clearly
        config[name] = value
