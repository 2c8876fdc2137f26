"""Read a trace: times of steps by stage, and of the device by program, scope and operation."""

import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import jax

from opd_jax.errors import WorkdirError
from opd_jax.metrics.tracing import STAGES, STEP

_NS = 1e-9
# Program -> stage; other programs are helpers of the host. The update includes the sums over replicas
# (gradients, loss) and the all-gather of the changed compute weights. With several processes, results are
# read through `_replicated`, mostly those of each chunk of decoding.
PROGRAMS = {
    "jit_unstack": "rollout", "jit_empty": "rollout", "jit_prefill": "rollout",
    "jit_decode_chunk": "rollout", "jit__replicated": "rollout", "jit_score_part": "score",
    "jit_discounted": "rows", "jit_add_gradient": "update", "jit_apply": "update",
    "jit__zeros_like": "update", "jit__summed": "update", "jit__total": "update",
    "jit__compute": "update", "jit__norm": "update", "jit__cosine": "update",
}  # fmt: skip
COMMUNICATION = "communication"  # the scope of collective operations of any program
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-")


@dataclasses.dataclass(frozen=True)
class Span:
    """A named time interval from `start` to `end`, in nanoseconds."""

    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program: number of executions, and seconds without its callees."""

    program: str
    name: str
    count: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """The traced steps.

    Attributes:
      count: number of steps.
      steps, stages: seconds of the host's spans, summed over all steps.
      operations: operations of the device.
    """

    count: int
    steps: float
    stages: Mapping[str, float]
    operations: Sequence[Operation]

    @property
    def rest(self) -> float:
        """Seconds of the steps outside all stages."""
        return self.steps - sum(self.stages.values())


def newest(folder: pathlib.Path) -> pathlib.Path:
    """Return the newest trace file under a folder. Raises WorkdirError where there is none."""
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise WorkdirError(
            f"{folder} has no trace; run with --config.profile.steps=2, or use launch/profile.py"
        )
    return files[-1]


def read(file: pathlib.Path) -> Trace:
    """Read a file of the profiler (*.xplane.pb)."""
    data = jax.profiler.ProfileData.from_file(str(file))
    spans: list[Span] = []
    times: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for plane in data.planes:
        for line in plane.lines:
            events: list[tuple[float, float, tuple[str, str]]] = []
            for event in line.events:
                if event.name == STEP or event.name in STAGES:
                    spans.append(
                        Span(event.name, event.start_ns, event.start_ns + event.duration_ns)
                    )
                    continue
                stats = dict(event.stats) if event.duration_ns else {}
                if "hlo_op" in stats and not event.name.startswith("end: "):
                    key = str(stats.get("hlo_module")), str(stats["hlo_op"])
                    events.append((event.start_ns, event.start_ns + event.duration_ns, key))
            for key, seconds in own_time(events):
                times[key] += seconds
                counts[key] += 1
    steps = [span for span in spans if span.name == STEP]
    operations = [Operation(*key, counts[key], seconds) for key, seconds in times.items()]
    operations.sort(key=lambda operation: -operation.seconds)
    return Trace(
        len(steps),
        _NS * sum(span.end - span.start for span in steps),
        within(steps, spans),
        operations,
    )


def within(steps: Sequence[Span], spans: Iterable[Span]) -> dict[str, float]:
    """Return the seconds of each stage inside the steps, in the order of `STAGES`."""
    out = dict.fromkeys(STAGES, 0.0)
    for span in spans:
        if span.name != STEP and any(s.start <= span.start and span.end <= s.end for s in steps):
            out[span.name] += _NS * (span.end - span.start)
    return {name: seconds for name, seconds in out.items() if seconds}


def own_time(
    events: Iterable[tuple[float, float, tuple[str, str]]],
) -> list[tuple[tuple[str, str], float]]:
    """Return the seconds of each event of one line without those of nested events, such as a loop's body."""
    out: list[list] = []
    open_: list[tuple[float, int]] = []  # end, index into out
    for start, end, key in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            out[open_[-1][1]][1] -= _NS * (min(end, open_[-1][0]) - start)
        open_.append((end, len(out)))
        out.append([key, _NS * (end - start)])
    return [(key, seconds) for key, seconds in out]


def by_stage(operations: Iterable[Operation]) -> dict[str, float]:
    """Return the device's seconds by stage; "other" for programs that belong to no stage."""
    out: dict[str, float] = defaultdict(float)
    for operation in operations:
        out[PROGRAMS.get(operation.program, "other")] += operation.seconds
    return dict(out)


def by_scope(
    operations: Iterable[Operation], scopes: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], float]:
    """Return the device's seconds by (stage, scope). `scopes`: program -> operation -> scope."""
    out: dict[tuple[str, str], float] = defaultdict(float)
    for operation in operations:
        scope = scope_of(operation, scopes)
        out[PROGRAMS.get(operation.program, "other"), scope] += operation.seconds
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def scope_of(operation: Operation, scopes: Mapping[str, Mapping[str, str]]) -> str:
    """Return the scope of an operation: `COMMUNICATION`, its scope in `scopes`, or "-"."""
    if operation.name.replace("_", "-").startswith(_COLLECTIVES):
        return COMMUNICATION
    return scopes.get(operation.program, {}).get(operation.name, "-")


# Scopes of the table; an operation belongs to the first that its name contains.
_SCOPES = ("adamw", "sample", "token_loss", "attend", "mlp", "attention", "embed")


def scopes_of(hlo: str) -> dict[str, str]:
    """Return instruction -> named scope, from the text of a compiled program."""
    scopes = {}
    for name, path in re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', hlo):
        scopes[name] = next((scope for scope in _SCOPES if f"/{scope}/" in path), "-")
    return scopes
