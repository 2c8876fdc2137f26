"""Read a workdir for the report. Everything incomplete, missing or invalid becomes a note."""

import array
import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import workdir
from opd_jax.report.curves import Curve
from opd_jax.training import collapse_detector, collapse_guard

TRUNCATION = "rollout/truncation_rate"
BEYOND = 1e30  # values of this size or more are not drawn
HIGH = 0.9  # TruncRate after the transition in 2604.08527 (Fig. 2)


@dataclasses.dataclass(frozen=True)
class Event:
    """An action of the guard, as logged in metrics.jsonl. `kind` is alarm, rollback, stop, ..."""

    step: int
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether there was an abrupt transition, as the guard finds in the log, whatever its action was.

    Attributes:
      text: one sentence. onset: about where it began, None without one. alarm: where it was certain.
    """

    text: str
    onset: int | None = None
    alarm: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of one workdir.

    Attributes:
      name: of the folder, with as many parents as distinguish it from the others.
      config, info, plan: config.json, run.json, plan.json; empty where they cannot be read.
      curves: of metrics.jsonl by key.
      lines: of metrics.jsonl, incomplete ones not counted. last: its largest step, 0 without any.
      events: of the guard.
      answers: eval/STEP/BENCHMARK.json as {step or "teacher": {benchmark: figures}}.
      results: results.json of launch/evaluate.py, else None.
      notes: sentences about files that could not be read.
    """

    folder: pathlib.Path
    name: str
    config: dict[str, Any]
    info: dict[str, Any]
    plan: dict[str, Any]
    curves: dict[str, Curve]
    lines: int
    last: int
    events: list[Event]
    verdict: Verdict
    answers: dict[str, dict[str, dict[str, float]]]
    results: dict[str, Any] | None
    notes: list[str]

    @property
    def benchmarks(self) -> list[str]:
        """Held-out data that was evaluated during the run."""
        parts = (key.split("/") for key in self.curves if key.startswith("eval/"))
        return sorted({each[1] for each in parts if len(each) == 3})


def read_all(folders: Sequence[str]) -> list[Run]:
    """Read every workdir once, in the given order. Raises WorkdirError: a folder is not a run."""
    paths = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in folders))
    return [read(path, name) for path, name in zip(paths, names(paths), strict=True)]


def names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Return the last parts of each path, as many as distinguish all of them."""
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        endings = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(endings)) == len(endings):
            return endings
    return [str(path) for path in paths]


def read(folder: pathlib.Path, name: str = "") -> Run:
    """Read one workdir. Raises WorkdirError where the folder is not one."""
    config = workdir.read_config(folder)
    notes: list[str] = []
    log = _Log(_rules(config))
    log.read(folder / "metrics.jsonl", notes)
    results = _object(folder / "results.json", notes) or None
    verdict = log.verdict()
    if results and not log.lines:
        verdict, notes = Verdict("An evaluation, without a log of training."), []
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        config=config,
        info=_object(folder / "run.json", notes),
        plan=_object(folder / "plan.json", notes),
        curves=log.curves(notes),
        lines=log.lines,
        last=log.last,
        events=log.events,
        verdict=verdict,
        answers=_answers(folder / "eval", notes) or _evaluated(results or {}),
        results=results,
        notes=notes,
    )


def objects(path: pathlib.Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield every line that is an object with an integer `step`; note how many others there are."""
    broken = torn = 0
    with path.open("rb") as file:
        for line in file:  # bytes: only a line feed ends a line
            row = parsed(line)
            if row is not None:
                yield row
            elif not line.endswith(b"\n"):
                torn = 1
            elif line.strip():
                broken += 1
    if torn:
        notes.append(f"{path.name}: the last line is not whole (the run was killed, or is writing)")
    if broken:
        notes.append(f"{path.name}: {broken} lines cannot be read and are left out")


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, None where it is not an object with an integer `step`."""
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    has_step = isinstance(row, dict) and type(row.get("step")) is int
    return row if has_step and 0 <= row["step"] < 2**53 else None


class _Log:
    """Accumulates metrics.jsonl line by line, in arrays instead of one object per line."""

    def __init__(self, rules: collapse_guard.Rules):
        self.lines = self.last = self._judged = 0
        self.events: list[Event] = []
        self._steps: dict[str, array.array] = collections.defaultdict(lambda: array.array("q"))
        self._values: dict[str, array.array] = collections.defaultdict(lambda: array.array("d"))
        self._rules, self._state = rules, collapse_guard.State()
        self._alarm: collapse_detector.Alarm | None = None
        self._over: int | None = None
        self._in_force: tuple[float, ...] = ()

    def read(self, path: pathlib.Path, notes: list[str]) -> None:
        if not path.is_file():
            notes.append("no metrics.jsonl: there are no curves")
            return
        strange: collections.Counter[str] = collections.Counter()
        for fields in objects(path, notes):
            self._line(fields["step"], fields, strange)
        if not self.lines:
            notes.append("metrics.jsonl is empty: there are no curves")
        for key, count in strange.items():
            notes.append(f"metrics.jsonl: {key} is no number on {count} lines; left out there")

    def _line(self, step: int, fields: dict[str, Any], strange: collections.Counter[str]) -> None:
        row: dict[str, float] = {}
        for key, value in fields.items():
            if key == "step":
                continue
            if type(value) not in (int, float):
                strange[key] += 1
                continue
            row[key] = _number(value)
            self._steps[key].append(step)
            self._values[key].append(row[key])
        self.lines += 1
        self.last = max(self.last, step)
        self._judge(step, row)
        if any(key.startswith("guard/") for key in row):
            self._add_events(step, row)

    def _judge(self, step: int, row: dict[str, float]) -> None:
        self._judged += math.isfinite(row.get(TRUNCATION, math.nan))
        self._state, alarm = collapse_detector.observe(self._state, step, row, self._rules)
        self._state, response = collapse_guard.respond(self._state, step, alarm, self._rules, [])
        if alarm is not None and self._alarm is None:
            self._alarm = alarm
        if "guard/recovered" in response.event and self._over is None:
            self._over = step

    def _add_events(self, step: int, row: dict[str, float]) -> None:
        """Add sentences for the guard's keys of a line."""

        def of(name: str) -> str:
            return f"{row[f'guard/{name}']:g}" if f"guard/{name}" in row else "?"

        def add(kind: str, text: str) -> None:
            self.events.append(Event(step, kind, text))

        if "guard/rolled_back_to" in row:
            add("rollback", f"went back from step {of('rolled_back_from')} to step "
                f"{of('rolled_back_to')}, rollback {of('rollbacks')}")  # fmt: skip
        if row.get("guard/alarm"):
            add("alarm", f"alarm: collapse since about step {of('onset')}")
        if "guard/masking" in row:
            add("masking", "repetitive tails are left out of the loss from here on"
                if row["guard/masking"] else "repetitive tails count again")  # fmt: skip
        if row.get("guard/recovered"):
            add("recovered", "healthy again")
        if row.get("guard/stopped"):
            add("stop", "the guard ended the run")
        in_force = tuple(row[key] for key in ("guard/beta_kl", "guard/lambda_gold") if key in row)
        if in_force and in_force != self._in_force:
            add(
                "terms",
                f"beta_kl={of('beta_kl')}, lambda_gold={of('lambda_gold')} from the next step",
            )
        self._in_force = in_force

    def curves(self, notes: list[str]) -> dict[str, Curve]:
        """Return the curves, sorted by step; for a step that was logged twice the later line counts."""
        out, holes = {}, []
        for key, steps in self._steps.items():
            step_N = np.frombuffer(steps, np.int64)
            value_N = np.frombuffer(self._values[key], np.float64)
            step_N, place_N = np.unique(step_N[::-1], return_index=True)
            value_N = value_N[::-1][place_N]
            out[key] = Curve(step_N, np.where(np.isfinite(value_N), value_N, np.nan))
            if not np.isfinite(value_N).all():
                holes.append(key)
        if holes:
            more = f" and {len(holes) - 3} more" if len(holes) > 3 else ""
            notes.append(
                f"no finite number at some steps, where curves have gaps: {', '.join(holes[:3])}{more}"
            )
        return out

    def verdict(self) -> Verdict:
        if not self._judged:
            return Verdict("No rollouts in the log: nothing to judge.")
        above = self._above()
        if self._alarm is None:
            if self._judged < collapse_detector.WARMUP + collapse_detector.SPLIT:
                return Verdict(f"Too short to judge: {self._judged} steps with rollouts.")
            text = f"No abrupt transition in {self._judged} steps with rollouts."
            if self.events:
                text += (
                    " The guard stepped in, see below; steps that were undone are not in the log."
                )
            if above is not None:
                text += f" But TruncRate is above {HIGH:.0%} at step {above}."
            return Verdict(text)
        alarm = self._alarm
        changed = alarm.text.partition(": ")[2].partition(": ")[2].replace("->", "→")
        text = f"Abrupt transition: since about step {alarm.onset}, certain at step {alarm.step}: {changed}."
        if above is not None:
            text += f" TruncRate is first above {HIGH:.0%} at step {above}."
        if self._over is not None:
            text += f" Over by itself, or by what was done, at step {self._over}."
        return Verdict(text, alarm.onset, alarm.step)

    def _above(self) -> int | None:
        """Return the first step whose TruncRate is above HIGH."""
        pairs = zip(self._steps[TRUNCATION], self._values[TRUNCATION], strict=True)
        return next((step for step, value in pairs if value > HIGH), None)


def _number(value: float) -> float:
    """Return NaN for a value that no figure can show."""
    return float(value) if abs(value) < BEYOND else math.nan


def _rules(config: dict[str, Any]) -> collapse_guard.Rules:
    """Return the guard's rules for this run, with action "warn"; the defaults where its own are invalid."""
    sections = {name: section_of(config, name) for name in ("guard", "rollout", "loss")}
    sections["guard"]["action"] = "warn"
    try:
        rules = collapse_guard.make_rules(ConfigDict(sections))
    except (ValueError, ZeroDivisionError):
        return collapse_guard.make_rules(configuration.default())
    sound = rules.threshold > 0 and rules.rollouts > 0
    return rules if sound else collapse_guard.make_rules(configuration.default())


def section_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a config; a field that is missing or has another type gets its default."""
    fields, logged = configuration.default()[name].to_dict(), config.get(name)
    for field, value in logged.items() if isinstance(logged, dict) else ():
        if type(value) is type(fields.get(field)):
            fields[field] = value
    return fields


def _object(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON file that holds an object; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name} cannot be read and is left out")
    return {}


def _evaluated(results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the evaluations in results.json, in the form of `_answers`."""
    figures = results.get("results")
    named = figures.items() if isinstance(figures, dict) else ()
    numbers = {name: _numbers(one) for name, one in named if isinstance(one, dict)}
    return {"this evaluation": numbers} if numbers else {}


def _numbers(fields: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in fields.items() if type(v) in (int, float) and math.isfinite(v)}


def _answers(folder: pathlib.Path, notes: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    out: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        fields = _object(path, notes)
        if numbers := _numbers(fields):
            out.setdefault(path.parent.name, {})[path.stem] = numbers
    return dict(sorted(out.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(20))))
