"""Run a probe from its config to its report; all input is checked before weights are loaded."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import workdir
from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.grading.grader import make_grader
from opd_jax.tools.probe import continuation, pair
from opd_jax.tools.probe.workload import Plan, config_of_run, load_student, make_plan
from opd_jax.workdir import atomic, console

NAMES = ("pair", "continuation")
__all__ = ["NAMES", "config_of_run", "run"]


def run(
    name: str,
    config: ConfigDict,
    *,
    folder: str | None = None,
    step: int | None = None,
    teachers: Sequence[str] = (),
    out: str | None = None,
    command: list[str],
) -> dict[str, Any]:
    """Run the probe `name`, print its results, write them to `out` (.json) if given, return the report.

    Args:
      config: a training config; the probe reads `data.train`, `rollout`, `probe` and the models' sections.
      folder: a run whose checkpoint of `step` (None: the newest) is the student, instead of
        `student.path`.
      teachers: model folders for `pair` to compare, instead of `teacher.path`.
      out: a new file.

    Raises an OpdError for errors that the user can correct.
    """
    if name not in NAMES:
        raise ConfigError(f"probe {name!r} is not known; {configuration.near(name, list(NAMES))}")
    if len(teachers) > 1 and name != "pair":
        raise ConfigError(
            f"{len(teachers)} teachers, but {name} takes one; give --teachers=DIR, or compare them with pair"
        )
    file = pathlib.Path(out) if out else None
    if file:
        _check_place(file)
    plan = make_plan(
        config, teachers=teachers, folder=folder, step=step, need_answers=name == "continuation"
    )
    rollout = plan.config.rollout
    if name == "continuation":
        continuation.depths(plan.config.probe.depths, rollout.max_response_tokens)
    source = _source(plan)
    progress = console.Progress(0, 0)
    for line in (
        f"{name}: student {source}",
        *plan.notes,
        *_remarks(plan),
        f"{len(plan.problems)} problems, answers of at most {rollout.max_response_tokens} tokens at "
        f"temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, seed {plan.config.seed}",
    ):
        progress.say(line)
    student, step = load_student(plan)
    with make_grader(plan.config.grading) as grader:
        probe = {"pair": pair.probe, "continuation": continuation.probe}[name]
        results, printed = probe(plan, student, grader, progress)
    report = {
        "probe": name,
        "student_from": {"path": plan.config.student.path, "workdir": folder, "step": step},
        "teachers_from": [setup.config.teacher.path for setup in plan.setups],
        "notes": [*plan.notes, *_remarks(plan)],
        "run": workdir.provenance(command),
        "config": json.loads(configuration.to_json(configuration.PROBING.of(plan.config))),
    } | results
    if file:
        _write(file, report)
    progress.say(printed)
    if file:
        progress.say(f"\nwritten to {file}")
    return report


def _source(plan: Plan) -> str:
    if plan.folder is None:
        return plan.config.student.path
    return f"from {plan.folder}, {'newest step' if plan.step is None else f'step {plan.step}'}"


def _remarks(plan: Plan) -> list[str]:
    """Return remarks that a reader needs to interpret the figures."""
    first = plan.setups[0]
    remarks = []
    if first.student_style != first.teacher_style:
        remarks.append(
            "the teacher gets a prompt of its own (data.teacher_*), which its accuracy depends on"
        )
    if plan.config.teacher.follow != "frozen":
        remarks.append(f"teacher.follow={plan.config.teacher.follow}: the teacher is the student")
    return remarks


def _check_place(file: pathlib.Path) -> None:
    if file.suffix != ".json":
        raise ConfigError(
            f"out={str(file)!r} is not a name that ends in .json; give --out=FILE.json"
        )
    if file.exists():
        raise WorkdirError(f"{file} exists already; give another --out, or remove it")
    if above := workdir.obstacle(file.parent):
        raise WorkdirError(
            f"{file} cannot be written ({above} is read-only or not a folder); give another --out"
        )


def _write(file: pathlib.Path, report: dict[str, Any]) -> None:
    with atomic.reported(file, "give another --out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        atomic.write_text(file, text + "\n")
