"""A watchdog: report a phase of the run that takes far longer than usual, with the stacks of all threads.

A process that is stuck (a collective that another process never joins, a slow read, a stopped process)
raises no error, and the heartbeats of JAX notice only processes that are dead or stopped. Two threads of
every process watch instead. One compares the time since the current phase began with the median of
earlier phases of its kind. The other one exchanges the progress of all processes through the
coordinator, so that a report can say which process is behind; it may block where the coordinator is
stopped, and the first one never waits for it.
"""

import collections
import dataclasses
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.errors import AGAIN
from opd_jax.metrics import tracing
from opd_jax.sharding import multihost

_RECENT = 50  # durations of a kind that the median is taken of
_EVERY_S = (1.0, 10.0)  # shortest and longest time between two looks of the threads
_LEAVE_S = 10.0  # at most so long an end takes after the other processes could see it


def limit(
    durations: Sequence[float], *, factor: float, least_s: float, first_s: float
) -> tuple[float, str]:
    """Return the seconds after which a phase is late, and the reason in words.

    The limit is max(least_s, factor * median) of the earlier `durations` of this kind without the first
    one, which compiled. Where there are none yet, the limit is `first_s`.
    """
    usual = durations[1:]
    if not usual:
        return first_s, f"watchdog.first_seconds={first_s:g}"
    median = statistics.median(usual)
    if factor * median <= least_s:
        return least_s, f"watchdog.seconds={least_s:g}, the median is {median:.1f} s"
    return factor * median, f"{factor:g} x the median of {median:.1f} s"


@dataclasses.dataclass(frozen=True)
class _Phase:
    kind: str
    step: int
    began: float


class Watchdog:
    """Watch the phases of a run in background threads; `begin` starts a phase and ends the one before it."""

    def __init__(self, section: Any):
        """`section`: the config section `watchdog`. Nothing is watched before the first `begin`."""
        self._section = section
        self._durations: dict[str, collections.deque[float]] = {}
        self._phase: _Phase | None = None
        self._reported = 0  # reports of this phase
        self._heard: dict[
            int, tuple[str, float]
        ] = {}  # progress of each process, and when it changed
        self._counts: dict[int, int] = {}
        self._ending = False
        self._closed = threading.Event()
        low, high = _EVERY_S
        self._every_s = min(max(section.seconds / 20, low), high)

    def __enter__(self) -> "Watchdog":
        if self._section.action != "off":
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if multihost.several():
                threading.Thread(target=self._exchange, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def begin(self, kind: str, step: int = 0) -> None:
        """Start a phase, such as "step", and record how long the phase before it took."""
        now, before = time.monotonic(), self._phase
        self._phase = _Phase(kind, step, now)
        if before is None:
            return
        seconds = now - before.began
        durations = self._durations.setdefault(before.kind, collections.deque(maxlen=_RECENT))
        durations.append(seconds)
        if self._reported:
            _print(f"no longer late: {_name(before)} ended after {seconds:.0f} s")
        self._reported = 0

    def late(self, now: float) -> str | None:
        """Return the report that is due at the time `now`, without the stacks; None where none is.

        A phase is reported when its limit is over, and again after each doubling of that time.
        """
        phase = self._phase
        if phase is None:
            return None
        after_s, why = limit(
            tuple(self._durations.get(phase.kind, ())), factor=self._section.factor,
            least_s=self._section.seconds, first_s=self._section.first_seconds,
        )  # fmt: skip
        seconds = now - phase.began
        if seconds < after_s * 2**self._reported:
            return None
        self._reported += 1
        found = tracing.current()
        stage = "" if found is None else f", {found[1]:.0f} s of it in stage {found[0]}"
        who = f"{socket.gethostname()}, pid {os.getpid()}"
        if multihost.several():
            who = f"process {multihost.index()} on {who}"
        lines = [
            f"late: {_name(phase)} has taken {seconds:.0f} s{stage}; wanted less than {after_s:.0f} s "
            f"({why}); {who}",
            *self._others(now),
        ]
        return "\n".join(lines)

    def _others(self, now: float) -> list[str]:
        """Return a line for each other process: its progress, and when it was last heard from."""
        return [
            f"late: process {i} was last heard from {now - at:.0f} s ago, in {progress}"
            for i, (progress, at) in sorted(self._heard.items())
            if i != multihost.index()
        ]

    def _watch(self) -> None:
        while not self._closed.wait(self._every_s):
            report = self.late(time.monotonic())
            told = self._ending and self._section.action == "end"
            if report is None and not told:
                continue
            _print(report or "late: another process of the run is late")
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            if self._section.action == "end":
                self._end()

    def _end(self) -> None:
        """End the process with status 75, after the others had time to see that it ends."""
        _print(
            "late: ended, as watchdog.action=end asks; run the same command again to resume from the last "
            "checkpoint"
        )
        self._ending = True
        # The others read `ending`; process 0 goes last, because the others need it for that.
        looks = (4 if multihost.first() else 2) if multihost.several() else 0
        last = threading.Timer(looks * self._every_s + _LEAVE_S, os._exit, [AGAIN])
        last.daemon = True
        last.start()  # where the coordinator is the process that is stuck, `leave` may be, too
        time.sleep(looks * self._every_s)
        multihost.leave(AGAIN)

    def _exchange(self) -> None:
        count = 0
        while not self._closed.wait(self._every_s):
            phase, found = self._phase, tracing.current()
            where = "start" if phase is None else _name(phase)
            if found is not None:
                where = f"stage {found[0]} of {where}"
            count += 1
            progress = {"where": where, "count": count, "ending": self._ending}
            try:
                everyone = multihost.exchange_progress(progress)
            except (
                Exception
            ):  # the coordinator does not answer; where it has ended, JAX ends the process
                continue
            self.note(everyone, time.monotonic())

    def note(self, everyone: Mapping[int, Any], now: float) -> None:
        """Record what each process published, and at which time that changed; see `exchange_progress`."""
        for i, other in everyone.items():
            if self._counts.get(i) != other["count"]:
                self._counts[i] = other["count"]
                self._heard[i] = (other["where"], now)
            self._ending = self._ending or other["ending"]


def _name(phase: _Phase) -> str:
    return (
        f"{phase.kind} {phase.step}"
        if phase.kind == "step"
        else f"{phase.kind} at step {phase.step}"
    )


def _print(text: str) -> None:
    os.write(
        sys.stderr.fileno(), f"\n{text}\n".encode()
    )  # one write: the main thread may print too
