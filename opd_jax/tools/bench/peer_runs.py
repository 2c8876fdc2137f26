"""The suite `peers`: the same case with another library and with this one, and the ratio of the two.

Every figure comes from a script of peers/ that runs alone on the machine, in its own process and its own
Python environment. If a peer cannot run a case, its row has the error.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opd_jax.tools.bench.measure import Row
from opd_jax.tools.bench.run import Case, Options, run_cases

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SCRIPTS = pathlib.Path(__file__).parent / "peers"
# Use huge pages, and keep freed memory for the next call; the same settings as host_memory.py.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1099511627776"
)
# Budget for the complete suite, with a 135M model on 2 cores (docs/measurements/benchmarks.md).
BUDGET_S = 5400.0
CHECK_TOLERANCE = 1e-3  # relative; both compute in float32, in different orders

Flags = Mapping[str, str | int | float]
Answer = dict[str, Any]  # the JSON line of a script; {"error": reason} where it failed
Ask = Callable[[str, str, Flags], Answer]


@dataclasses.dataclass(frozen=True)
class Ratio(Row):
    """The row of a pair. `ratio`: the peer's median seconds / ours; `wanted`: the goal for it."""

    ratio: float | None = None
    wanted: float | None = None


@dataclasses.dataclass(frozen=True)
class Pythons:
    """The interpreter of each environment; "" where it is not available."""

    ours: str = sys.executable
    torch: str = sys.executable  # with transformers
    trl: str = ""
    tunix: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """A script of peers/, the field of `Pythons` that runs it, and its flags."""

    label: str
    script: str
    python: str
    flags: Flags = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A case for two libraries. `wanted`: the goal for the ratio; None where it is only reported."""

    name: str
    shape: str
    flags: Flags
    peer: Side
    ours: Side
    wanted: float | None = None


def pairs(*, dry: bool = False) -> list[Pair]:
    """Return all comparisons; `dry` selects toy shapes."""

    def size(real: int, toy: int) -> int:
        return toy if dry else real

    out = []
    for batch in (size(8, 2), size(32, 3)):
        flags = {"batch": batch, "prompt": size(64, 8), "new": size(128, 4)}
        shape = f"batch {batch}, prompt {flags['prompt']}, {flags['new']} new"
        ours = Side("ours", "ours_generate", "ours")
        for label, script, python in (
            ("transformers", "transformers_generate", "torch"),
            ("Tunix", "tunix_generate", "tunix"),
        ):
            peer = Side(label, script, python)
            out.append(Pair("generate", shape, flags, peer, ours, 2.0))
    flags = {"batch": size(8, 2), "prompt": size(256, 16)}
    shape = f"{flags['batch']} x {flags['prompt']}"
    for name, peer_what, our_what, goal in (
        ("products of a forward pass", "products_forward", "products_forward", None),
        ("products of an update", "products_update", "products_update", None),
        ("score, student and teacher", "score", "score", 0.9),
        ("score, all statistics", "score", "score_all", None),
        ("update", "update", "update", 0.9),
    ):
        peer = Side("torch", "torch_train", "torch", {"what": peer_what})
        ours = Side("ours", "ours_train", "ours", {"what": our_what})
        out.append(Pair(name, shape, flags, peer, ours, goal))
    for new, goal in ((size(64, 4), 1.5), (size(256, 5), 2.0)):
        flags = {"batch": size(8, 2), "prompt": size(64, 8), "new": new}
        shape = f"batch {flags['batch']}, prompt {flags['prompt']}, {new} new"
        peer = Side("TRL", "trl_step", "trl")
        for name, loss, least in (
            ("OPD step, full reverse KL", "full", goal),
            ("OPD step, sampled tokens", "sampled", None),
        ):
            ours = Side("ours", "ours_step", "ours", {"loss": loss})
            out.append(Pair(name, shape, flags, peer, ours, least))
    return out


def run(options: Options, pythons: Pythons, *, timeout_s: float = 900.0) -> list[Row]:
    """Run the suite with the model `options.model`; return its rows."""

    def ask(python: str, script: str, flags: Flags) -> Answer:
        return answer(python, SCRIPTS / f"{script}.py", flags, timeout_s=timeout_s)

    answers: dict[str, Answer] = {}
    shared: Flags = {"model": options.model, "repeats": options.repeats}

    def case(pair: Pair) -> Case:
        name = f"{pair.name}: {pair.peer.label}"
        return Case(name, pair.shape, lambda: list(compare(pair, shared, pythons, ask, answers)))

    return run_cases("peers", [case(pair) for pair in pairs(dry=options.dry)], options)


def compare(
    pair: Pair, shared: Flags, pythons: Pythons, ask: Ask, known: dict[str, Answer]
) -> Iterator[Row]:
    """Yield a row for each side and one for the ratio. A side whose answer is in `known` is not run again."""
    answers = []
    for side in (pair.peer, pair.ours):
        flags = {**shared, **pair.flags, **side.flags}
        name = " ".join([side.script, *_arguments(flags)])
        if new := name not in known:
            python = getattr(pythons, side.python)
            missing = {"missing": f"no Python with {side.label} is given"}
            known[name] = ask(python, side.script, flags) if python else missing
        answers.append(known[name])
        if new:
            yield side_row(f"{pair.name}: {side.label}", pair.shape, known[name])
    yield ratio_row(pair, *answers)


def side_row(name: str, shape: str, result: Answer) -> Row:
    """Return the row of one side, with the reason where it has no figures."""
    if problem := _problem(result):
        return Row(name, shape, **problem)
    return Row(
        name,
        shape,
        median_s=result["seconds"],
        min_s=min(result["repeats"]),
        max_s=max(result["repeats"]),
        repeats=len(result["repeats"]),
        first_s=result["warmup"],
        tokens_per_s=result["tokens_per_second"],
        peak_gib=result["peak_gib"],
        peak_of="process",
        note=_note(result),
    )


def ratio_row(pair: Pair, theirs: Answer, ours: Answer) -> Ratio:
    """Return the row of the ratio: the peer's median seconds / ours.

    Its status is "missed" below the goal, and "failed" where the two did not compute the same.
    """
    row = Ratio(f"{pair.name}: ours against {pair.peer.label}", pair.shape, wanted=pair.wanted)
    if problem := _problem(theirs) or _problem(ours):
        return dataclasses.replace(row, **problem)
    if deviation := difference(theirs, ours):
        return dataclasses.replace(row, status="failed", note=deviation)
    ratio = theirs["seconds"] / ours["seconds"]
    least = min(theirs["repeats"]) / max(ours["repeats"])
    most = max(theirs["repeats"]) / min(ours["repeats"])
    goal = "" if pair.wanted is None else f", wanted {pair.wanted:.2f} x"
    return dataclasses.replace(
        row,
        status="missed" if pair.wanted and ratio < pair.wanted else "ok",
        ratio=ratio,
        note=f"{ratio:.2f} x{goal} ({least:.2f} to {most:.2f} over the repeats)",
    )


def difference(theirs: Answer, ours: Answer) -> str:
    """Return how the work of two sides differs, "" where it does not."""
    for name in ("prompts", "tokens"):
        if theirs[name] != ours[name]:
            return f"different {name}: theirs {theirs[name]}, ours {ours[name]}"
    for name in theirs["check"].keys() & ours["check"].keys():
        peer, our = theirs["check"][name], ours["check"][name]
        if not math.isclose(peer, our, rel_tol=CHECK_TOLERANCE):
            return f"different {name}: theirs {peer:.6g}, ours {our:.6g}"
    return ""


def answer(python: str, script: pathlib.Path, flags: Flags, *, timeout_s: float) -> Answer:
    """Run a script; return its last line of output as JSON, {"error": its last line of stderr} on failure."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("GLIBC_TUNABLES", ALLOCATOR)  # for both sides
    if script.name.startswith("ours_"):
        environment["PYTHONPATH"] = str(REPOSITORY)
    command = [python, str(script), *_arguments(flags)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer after {timeout_s:.0f} s"}
    except OSError as error:
        return {"error": f"{python!r} cannot be run: {error.strerror}"}
    if done.returncode:
        return {"error": _last(done.stderr)[:600] or f"exit status {done.returncode}"}
    try:
        return json.loads(_last(done.stdout))
    except ValueError:
        return {"error": f"printed {_last(done.stdout)[:200]!r} instead of a line of JSON"}


def _arguments(flags: Flags) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _problem(result: Answer) -> dict[str, Any] | None:
    if "missing" in result:
        return {"status": "not run", "note": result["missing"]}
    if "error" in result:
        return {"status": "error", "note": result["error"]}
    return None


def _note(result: Answer) -> str:
    """Return versions, stages and the script's own note."""
    parts = [f"{name} {version}" for name, version in result.get("versions", {}).items()]
    parts += [f"{name} {seconds:.2f} s" for name, seconds in result.get("stages", {}).items()]
    note = [result["note"]] if result.get("note") else []
    return "; ".join([", ".join(parts), *note])
