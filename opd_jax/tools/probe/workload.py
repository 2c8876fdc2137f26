"""What a probe is about, known and checked before any weights are loaded."""

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
from opd_jax.training.roles import compute_dtype
from opd_jax.training.setup import Setup, make_setup
from opd_jax.training.weights import load_weights


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked student, its teachers, and the problems put to them.

    Attributes:
      setups: one a teacher; what they say of the student is the same in all.
      problems: the first that training would see, in its order.
      folder, step: the run whose checkpoint holds the student; None: its model folder does.
      notes: what the setups say of vocabularies and data.
    """

    setups: list[Setup]
    problems: list[data.Problem]
    folder: pathlib.Path | None
    step: int | None
    notes: list[str]

    @property
    def config(self) -> ConfigDict:
        """The config of the first teacher; all but section `teacher` is that of every one."""
        return self.setups[0].config

    @property
    def drawn(self) -> np.ndarray:
        """Ids that the student's rollouts may hold: those that every teacher can read; bool [V]."""
        return np.logical_and.reduce([setup.alignment.drawn for setup in self.setups])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The student's end tokens."""
        return self.setups[0].alignment.stop_ids


def config_of_run(folder: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """The config that a run was started with, with fields of one's own in place of some.

    Fields that a run of an older version lacks have their defaults. Raises WorkdirError: no run.
    """
    kept = configuration.flatten(workdir.read_config(pathlib.Path(folder)))
    config = configuration.default()
    for field, usual in configuration.flatten(config.to_dict()).items():
        value = kept.get(field, usual)
        _set(config, field, tuple(value) if isinstance(usual, tuple) else value)
    if config.teacher.follow != "frozen":
        config.teacher.path = "student"  # config.json has the folder that this stood for
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
    """Read and check all but the weights; see `run` for the arguments. Raises an OpdError."""
    if not folder and step is not None:
        raise ConfigError(f"step={step} is of a run's checkpoint; give the run: --workdir=DIR")
    config = _for_probing(config)
    if folder:
        student = workdir.read_config(pathlib.Path(folder))["student"]
        for field in ("path", "rope_theta", "max_position", "chat_template", "enable_thinking"):
            config.student[field] = student.get(field, config.student[field])
        config.data.date = config.data.date or workdir.date_of(pathlib.Path(folder))
        if config.teacher.follow == "average":
            raise ConfigError(
                "teacher.follow=average: a checkpoint's moving average is not probed, wanted frozen "
                "or live; set --config.teacher.follow=frozen"
            )
    if not (config.teacher.path or teachers):
        raise ConfigError(
            "teacher.path='', wanted the teacher to ask about; set --config.teacher.path=DIR"
        )
    setups = []
    for path in teachers or [config.teacher.path]:
        config.teacher.path = path
        setups.append(make_setup(config, ONE))
    problems = _problems(setups, need_answers=need_answers)
    notes = list(dict.fromkeys(note for setup in setups for note in setup.notes))
    return Plan(setups, problems, pathlib.Path(folder) if folder else None, step, notes)


def load_student(plan: Plan) -> tuple[models.Params, int | None]:
    """The student in the dtype it computes in, and the step of its checkpoint, if it has one."""
    setup, config = plan.setups[0], plan.config
    dtype = compute_dtype(config.student.dtype)
    if plan.folder is None:
        return models.load(config.student.path, dtype=dtype)[1], None
    like = decoder.abstract_params(setup.student)
    step, params = checkpoint.restore_params(plan.folder, like, step=plan.step)
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params), step


def load_teacher(setup: Setup, student: models.Params) -> tuple[models.Params, models.Params]:
    """The teacher in its own ids, and in the student's, for scoring; one that follows is the student."""
    if setup.config.teacher.follow != "frozen":
        return student, student
    weights = load_weights(setup, student=False)
    assert weights.teacher is not None  # a plan has a teacher
    assert weights.scorer is not None
    return weights.teacher, weights.scorer


def _for_probing(config: ConfigDict) -> ConfigDict:
    """A copy that asks for rollouts and a teacher, and for nothing else that training may need."""
    config = config.copy_and_resolve_references()
    config.loss = configuration.default().loss  # plain OPD: no reference, no golden solutions
    config.guard.action = "off"  # which may raise terms that need them
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
            f"data.train: problem {unanswered[0]} has no answer, wanted one for every problem: the "
            "probe counts right answers; name data with answers: --config.data.train=FILE"
        )
    for setup in setups:  # of generated problems only the first were looked at
        _require_room(setup, problems)
    return problems


def _require_room(setup: Setup, problems: Sequence[data.Problem]) -> None:
    """Both models' prompts fit beside a whole response, so every prefix of one does too."""
    rollout = setup.config.rollout
    own = setup.student_style.prompts(problems, setup.tokenizer)
    others = setup.teacher_style.prompts(problems, setup.teacher_tokenizer)
    for problem, mine, theirs in zip(problems, own, others, strict=True):
        assert setup.teacher is not None  # _for_probing
        misfit = prompt_misfit(len(mine), rollout.max_prompt_tokens)
        misfit = misfit or teacher_misfit(
            len(theirs), setup.teacher.max_position, rollout.max_response_tokens
        )
        if misfit:
            path = setup.config.teacher.path
            raise DataError(f"data.train: problem {problem.id}: {misfit[1]} (teacher {path})")


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():  # validate has the better words for it
        config[name] = value
