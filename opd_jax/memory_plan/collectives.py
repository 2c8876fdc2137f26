"""Bytes that a device sends to others while a compiled program runs, read from the program's text."""

import math
import re
from collections.abc import Mapping

_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
             "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
# Bytes sent for each byte of the result by one of n devices in a ring.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_KINDS = "|".join(_SENT)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def sent_bytes(text: str, devices: int) -> float:
    """Of one device, in one run of the program; a loop of unknown length counts as one round.

    `text` is that of the compiled module (`Compiled.as_text()`), `devices` how many it is for.
    """
    entry, lines = "", dict[str, list[str]]()
    name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            lines[name] = []
            entry = name if found[1] else entry
        elif name:
            lines[name].append(line)
    return _sent(entry, lines, devices, {})


def _sent(
    name: str, lines: Mapping[str, list[str]], devices: int, known: dict[str, float]
) -> float:
    if name not in known:
        known[name] = sum(_of_line(line, lines, devices, known) for line in lines.get(name, ()))
    return known[name]


def _of_line(
    line: str, lines: Mapping[str, list[str]], devices: int, known: dict[str, float]
) -> float:
    if found := _COLLECTIVE.search(line):
        result, kind, start = found.groups()
        sizes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
        if start and (kind != "all-reduce" or result.startswith("((")):  # (given, made)
            sizes = sizes[len(sizes) // 2 :]
        return sum(sizes) * _SENT[kind](_group(line, devices))
    called = _CALLED.findall(line)
    if found := _BRANCHES.search(line):  # the dearest
        names = [part.strip().lstrip("%") for part in found[1].split(",")]
        return max(_sent(one, lines, devices, known) for one in names)
    trips = _TRIPS.search(line)
    return (int(trips[1]) if trips else 1) * sum(
        _sent(one, lines, devices, known) for one in called
    )


def _bytes(dtype: str, dimensions: str) -> float:
    count = 1
    for size in filter(None, dimensions.split(",")):
        count *= int(size)
    return float(count * _ITEMSIZE.get(dtype, 0))


def _group(line: str, devices: int) -> int:
    """How many devices take part together."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # sizes, names of axes
        sizes = dict(pair.split("=") for pair in found[1].split(","))
        return math.prod(int(sizes[name]) for name in found[2].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    return devices
