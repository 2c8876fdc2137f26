"""The suite `peers`: the same case by another library and by this one, and the ratio of the two.

Every figure comes from a script of peers/ in a process of its own, in the Python given for it, with
the whole machine to itself. A peer that cannot run a case leaves a row that says how it failed.
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
# Huge pages, and memory that was freed is kept for the next call (host_memory.py, of any program).
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1099511627776"
)
# Of the whole suite, with a model of 135M on 2 cores (docs/measurements/benchmarks.md).
BUDGET_S = 5400.0
CHECK_TOLERANCE = 1e-3  # relative; both compute in float32, in other orders

Flags = Mapping[str, str | int | float]
Answer = dict[str, Any]  # the JSON line of a script; {"error": why} where there is none
Ask = Callable[[str, str, Flags], Answer]


@dataclasses.dataclass(frozen=True)
class Ratio(Row):
    """The row of a pair. `ratio`: the peer's median seconds over ours; `wanted`: what that is to be."""

    ratio: float | None = None
    wanted: float | None = None


@dataclasses.dataclass(frozen=True)
class Pythons:
    """The interpreter of each environment; "" where there is none."""

    ours: str = sys.executable
    torch: str = sys.executable  # with transformers
    trl: str = ""
    tunix: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """A script of peers/, the field of `Pythons` that runs it, and its own flags."""

    label: str
    script: str
    python: str
    flags: Flags = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A case by two sides. `wanted`: by how much ours is to be the faster; None where it is only told."""

    name: str
    shape: str
    flags: Flags
    peer: Side
    ours: Side
    wanted: float | None = None


def pairs(*, dry: bool = False) -> list[Pair]:
    """Every comparison; `dry` shrinks the shapes."""

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
    for name, theirs, mine, wanted in (
        ("products of a forward pass", "products_forward", "products_forward", None),
        ("products of an update", "products_update", "products_update", None),
        ("score, student and teacher", "score", "score", 0.9),
        ("score, all statistics", "score", "score_all", None),
        ("update", "update", "update", 0.9),
    ):
        peer = Side("torch", "torch_train", "torch", {"what": theirs})
        ours = Side("ours", "ours_train", "ours", {"what": mine})
        out.append(Pair(name, shape, flags, peer, ours, wanted))
    for new, wanted in ((size(64, 4), 1.5), (size(256, 5), 2.0)):
        flags = {"batch": size(8, 2), "prompt": size(64, 8), "new": new}
        shape = f"batch {flags['batch']}, prompt {flags['prompt']}, {new} new"
        peer = Side("TRL", "trl_step", "trl")
        for name, loss, least in (
            ("OPD step, full reverse KL", "full", wanted),
            ("OPD step, sampled tokens", "sampled", None),
        ):
            ours = Side("ours", "ours_step", "ours", {"loss": loss})
            out.append(Pair(name, shape, flags, peer, ours, least))
    return out


def run(options: Options, pythons: Pythons, *, timeout_s: float = 900.0) -> list[Row]:
    """All rows with the model of `options.model`."""

    def ask(python: str, script: str, flags: Flags) -> Answer:
        return answer(python, SCRIPTS / f"{script}.py", flags, timeout_s=timeout_s)

    asked: dict[str, Answer] = {}
    shared: Flags = {"model": options.model, "repeats": options.repeats}

    def case(pair: Pair) -> Case:
        name = f"{pair.name}: {pair.peer.label}"
        return Case(name, pair.shape, lambda: list(compare(pair, shared, pythons, ask, asked)))

    return run_cases("peers", [case(pair) for pair in pairs(dry=options.dry)], options)


def compare(
    pair: Pair, shared: Flags, pythons: Pythons, ask: Ask, asked: dict[str, Answer]
) -> Iterator[Row]:
    """A row a side, and one of the ratio. A side that is in `asked` already is not run again."""
    answers = []
    for side in (pair.peer, pair.ours):
        flags = {**shared, **pair.flags, **side.flags}
        name = " ".join([side.script, *_arguments(flags)])
        if new := name not in asked:
            python = getattr(pythons, side.python)
            none = {"missing": f"no Python with {side.label} is given"}
            asked[name] = ask(python, side.script, flags) if python else none
        answers.append(asked[name])
        if new:
            yield side_row(f"{pair.name}: {side.label}", pair.shape, asked[name])
    yield ratio_row(pair, *answers)


def side_row(name: str, shape: str, given: Answer) -> Row:
    """The figures of one side, or why there are none."""
    if problem := _problem(given):
        return Row(name, shape, **problem)
    return Row(
        name,
        shape,
        median_s=given["seconds"],
        min_s=min(given["repeats"]),
        max_s=max(given["repeats"]),
        repeats=len(given["repeats"]),
        first_s=given["warmup"],
        tokens_per_s=given["tokens_per_second"],
        peak_gib=given["peak_gib"],
        peak_of="process",
        note=_told(given),
    )


def ratio_row(pair: Pair, theirs: Answer, ours: Answer) -> Ratio:
    """How many times ours is as fast: the peer's median seconds over ours.

    "missed" where that is less than wanted; "failed" where the two did not do the same thing.
    """
    row = Ratio(f"{pair.name}: ours against {pair.peer.label}", pair.shape, wanted=pair.wanted)
    if problem := _problem(theirs) or _problem(ours):
        return dataclasses.replace(row, **problem)
    if unlike := difference(theirs, ours):
        return dataclasses.replace(row, status="failed", note=unlike)
    ratio = theirs["seconds"] / ours["seconds"]
    least = min(theirs["repeats"]) / max(ours["repeats"])
    most = max(theirs["repeats"]) / min(ours["repeats"])
    wanted = "" if pair.wanted is None else f", wanted {pair.wanted:.2f} x"
    return dataclasses.replace(
        row,
        status="missed" if pair.wanted and ratio < pair.wanted else "ok",
        ratio=ratio,
        note=f"{ratio:.2f} x{wanted} ({least:.2f} to {most:.2f} over the repeats)",
    )


def difference(theirs: Answer, ours: Answer) -> str:
    """In what the work of two sides differs; "" where it does not."""
    for name in ("prompts", "tokens"):
        if theirs[name] != ours[name]:
            return f"other {name}: theirs {theirs[name]}, ours {ours[name]}"
    for name in theirs["check"].keys() & ours["check"].keys():
        one, other = theirs["check"][name], ours["check"][name]
        if not math.isclose(one, other, rel_tol=CHECK_TOLERANCE):
            return f"other {name}: theirs {one:.6g}, ours {other:.6g}"
    return ""


def answer(python: str, script: pathlib.Path, flags: Flags, *, timeout_s: float) -> Answer:
    """What a script prints last, as JSON; {"error": its last line of complaint} where it fails."""
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
        return {"error": f"printed {_last(done.stdout)[:200]!r}, wanted a line of JSON"}


def _arguments(flags: Flags) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _problem(given: Answer) -> dict[str, Any] | None:
    if "missing" in given:
        return {"status": "not run", "note": given["missing"]}
    if "error" in given:
        return {"status": "error", "note": given["error"]}
    return None


def _told(given: Answer) -> str:
    """Versions, stages and the script's own note."""
    told = [f"{name} {version}" for name, version in given.get("versions", {}).items()]
    told += [f"{name} {seconds:.2f} s" for name, seconds in given.get("stages", {}).items()]
    return "; ".join([", ".join(told), given["note"]] if given.get("note") else [", ".join(told)])
