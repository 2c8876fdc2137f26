"""What a trace says: seconds of each step by stage, of the device by program, scope and operation."""

import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import jax

from opd_jax.errors import WorkdirError
from opd_jax.metrics.tracing import STAGES, STEP

_NS = 1e-9
# Programs by the stage they belong to; others are the host's helpers. The update's include the sums over
# replicas (gradients, loss) and the gathering of the compute weights that it has changed. Several
# processes read results by `_replicated`: mostly each chunk of decoding.
PROGRAMS = {
    "jit_unstack": "rollout", "jit_empty": "rollout", "jit_prefill": "rollout",
    "jit_decode_chunk": "rollout", "jit__replicated": "rollout", "jit_score_part": "score",
    "jit_discounted": "rows", "jit_add_gradient": "update", "jit_apply": "update",
    "jit__zeros_like": "update", "jit__summed": "update", "jit__total": "update",
    "jit__compute": "update", "jit__norm": "update", "jit__cosine": "update",
}  # fmt: skip
COMMUNICATION = "communication"  # the scope of operations between devices, wherever they come from
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-")


@dataclasses.dataclass(frozen=True)
class Span:
    """A named piece of time: nanoseconds from `start` to `end`."""

    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program: how often it ran, and its seconds without what it calls."""

    program: str
    name: str
    count: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """Of the steps traced: their seconds, those of their stages, and the device's operations.

    `steps`, `stages`: seconds of the host's spans, all steps together.
    """

    count: int
    steps: float
    stages: Mapping[str, float]
    operations: Sequence[Operation]

    @property
    def rest(self) -> float:
        """Seconds of the steps in no stage."""
        return self.steps - sum(self.stages.values())


def newest(folder: pathlib.Path) -> pathlib.Path:
    """The newest trace file under a folder. Raises WorkdirError where there is none."""
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise WorkdirError(
            f"{folder} holds no trace; run with --config.profile.steps=2, or launch/profile.py"
        )
    return files[-1]


def read(file: pathlib.Path) -> Trace:
    """The trace of a file that the profiler wrote (*.xplane.pb)."""
    data = jax.profiler.ProfileData.from_file(str(file))
    spans: list[Span] = []
    times: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for plane in data.planes:
        for line in plane.lines:
            ran: list[tuple[float, float, tuple[str, str]]] = []
            for event in line.events:
                if event.name == STEP or event.name in STAGES:
                    spans.append(
                        Span(event.name, event.start_ns, event.start_ns + event.duration_ns)
                    )
                    continue
                stats = dict(event.stats) if event.duration_ns else {}
                if "hlo_op" in stats and not event.name.startswith("end: "):
                    key = str(stats.get("hlo_module")), str(stats["hlo_op"])
                    ran.append((event.start_ns, event.start_ns + event.duration_ns, key))
            for key, seconds in own_time(ran):
                times[key] += seconds
                counts[key] += 1
    steps = [span for span in spans if span.name == STEP]
    operations = [Operation(*key, counts[key], seconds) for key, seconds in times.items()]
    operations.sort(key=lambda one: -one.seconds)
    return Trace(
        len(steps),
        _NS * sum(span.end - span.start for span in steps),
        within(steps, spans),
        operations,
    )


def within(steps: Sequence[Span], spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of each stage inside the steps, in the order of `STAGES`."""
    out = dict.fromkeys(STAGES, 0.0)
    for span in spans:
        if span.name != STEP and any(s.start <= span.start and span.end <= s.end for s in steps):
            out[span.name] += _NS * (span.end - span.start)
    return {name: seconds for name, seconds in out.items() if seconds}


def own_time(
    ran: Iterable[tuple[float, float, tuple[str, str]]],
) -> list[tuple[tuple[str, str], float]]:
    """Seconds of each event of one line less those of the events inside it (a loop holds its body's)."""
    out: list[list] = []
    open_: list[tuple[float, int]] = []  # end, index into out
    for start, end, key in sorted(ran, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            out[open_[-1][1]][1] -= _NS * (min(end, open_[-1][0]) - start)
        open_.append((end, len(out)))
        out.append([key, _NS * (end - start)])
    return [(key, seconds) for key, seconds in out]


def by_stage(operations: Iterable[Operation]) -> dict[str, float]:
    """The device's seconds by stage; "other" for programs that are no stage's."""
    out: dict[str, float] = defaultdict(float)
    for one in operations:
        out[PROGRAMS.get(one.program, "other")] += one.seconds
    return dict(out)


def by_scope(
    operations: Iterable[Operation], scopes: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], float]:
    """The device's seconds by (stage, scope). `scopes`: of each program, the scope of each operation."""
    out: dict[tuple[str, str], float] = defaultdict(float)
    for one in operations:
        scope = scope_of(one, scopes)
        out[PROGRAMS.get(one.program, "other"), scope] += one.seconds
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def scope_of(one: Operation, scopes: Mapping[str, Mapping[str, str]]) -> str:
    """Return the scope of an operation: `COMMUNICATION`, that of its program's text, or "-"."""
    if one.name.replace("_", "-").startswith(_COLLECTIVES):
        return COMMUNICATION
    return scopes.get(one.program, {}).get(one.name, "-")


# What a scope is called in the table, by the first of these that an operation's name holds.
_SCOPES = ("adamw", "sample", "token_loss", "attend", "mlp", "attention", "embed")


def scopes_of(hlo: str) -> dict[str, str]:
    """Each instruction of a compiled program's text and the named scope it came from."""
    found = {}
    for name, path in re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', hlo):
        found[name] = next((scope for scope in _SCOPES if f"/{scope}/" in path), "-")
    return found
