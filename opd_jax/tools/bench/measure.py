"""Measure time and memory of a call as a row of a table, with the warm-up separate from the repeats."""

import contextlib
import dataclasses
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from opd_jax.metrics.timing import peak_gib
from opd_jax.models import flops as account
from opd_jax.models.flops import Work

_STATUS, _RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the first call, which compiles, and of each repeat."""

    first_s: float
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak memory. `of`: "row", "process" (since its start), or "sampled" by a thread."""

    gib: float = 0.0
    of: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the results. A figure that does not apply is None.

    Attributes:
      name, shape: description of the measurement.
      status: "ok"; "failed": a check exceeds its limit; "missed": a ratio is below its goal, which is in
        the note; "error": the case raised; "not run": no time was left.
      median_s, min_s, max_s, repeats: of the repeats. first_s: of the first call, including compilation.
      tokens_per_s: throughput in the tokens that the name refers to.
      floor_s: seconds of the row's own matrix products alone, measured in the same run (floors.py).
      fraction: minimum seconds (`flops` and `bytes` at the measured limits) / median_s.
      bound: the limit that dominates the minimum seconds, "memory" or "compute".
      peak_gib, peak_of: see `Peak`.
      error, limit: of a check: the largest deviation, and the allowed one.
      note: a remark for the reader; for an error, its text.
      case: name of the case that measured it.
    """

    name: str
    shape: str = ""
    status: str = "ok"
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    repeats: int | None = None
    first_s: float | None = None
    tokens_per_s: float | None = None
    floor_s: float | None = None
    fraction: float | None = None
    bound: str | None = None
    flops: float | None = None
    bytes: float | None = None
    peak_gib: float | None = None
    peak_of: str | None = None
    error: float | None = None
    limit: float | None = None
    note: str = ""
    case: str = ""


def time_call(
    fn: Callable[[], Any], *, repeats: int, most_s: float = float("inf"), warm: bool = False
) -> Timing:
    """Call once (compile and run), then `repeats` times, waiting for the result each time.

    No repeat starts after `most_s` seconds of repeats. `warm`: the function was called before, so the
    first call counts as a repeat too.
    """

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(fn())
        return time.perf_counter() - start

    first = once()
    seconds = [first] if warm else [once()]
    while len(seconds) < repeats and sum(seconds) < most_s:
        seconds.append(once())
    return Timing(first, tuple(seconds))


def difference(long: Timing, short: Timing) -> Timing:
    """Return the repeats of `long` minus the median of `short`."""
    seconds = tuple(max(s - short.median_s, 1e-9) for s in long.seconds)
    return Timing(long.first_s + short.first_s, seconds)


def make_row(
    name: str,
    shape: str,
    timing: Timing,
    *,
    tokens: float | None = None,
    works: Sequence[Work] = (),
    flops_per_s: float = float("inf"),
    bytes_per_s: float = float("inf"),
    peak: Peak | None = None,
) -> Row:
    """Return the row of a timing; with `works`, also its fraction of the roofline of the two limits."""
    median_s = timing.median_s
    row = Row(
        name, shape,
        median_s=median_s, min_s=min(timing.seconds), max_s=max(timing.seconds),
        repeats=len(timing.seconds), first_s=timing.first_s,
        tokens_per_s=None if tokens is None else tokens / median_s,
        peak_gib=peak.gib if peak else None, peak_of=peak.of if peak else None,
    )  # fmt: skip
    if not works:
        return row
    least_s, bound = account.floor_seconds(works, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)
    return dataclasses.replace(
        row,
        fraction=least_s / median_s,
        bound=bound,
        flops=sum(w.flops for w in works),
        bytes=sum(w.bytes for w in works),
    )


def make_check(name: str, shape: str, error: float, limit: float) -> Row:
    """Return the row of a correctness check; nan exceeds every limit."""
    status = "ok" if error <= limit else "failed"
    return Row(name, shape, status, error=error, limit=limit, note=f"{error:.1e}, limit {limit:g}")


@contextlib.contextmanager
def watch_memory() -> Iterator[Callable[[], Peak]]:
    """Measure the peak memory of the block: `with watch_memory() as peak: ...; peak()` inside or after.

    On a device with memory statistics: the device's peak if the block raised it, else the maximum that a
    thread sampled 200 times per second. On a CPU: the process's peak, reset at the start where the system
    allows it.
    """
    device = jax.local_devices()[0]
    if not device.memory_stats():
        of = "row" if _reset_peak() else "process"
        yield lambda: Peak(_resident_peak_gib() if of == "row" else peak_gib(), of)
        return
    before, highest, done = peak_gib(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], (device.memory_stats() or {}).get("bytes_in_use", 0))

    def peak() -> Peak:
        now = peak_gib()
        return Peak(now, "row") if now > before else Peak(highest[0] / 2**30, "sampled")

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _reset_peak() -> bool:
    """Reset the process's peak of resident memory (Linux); return whether that worked."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak_gib() -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return peak_gib()
