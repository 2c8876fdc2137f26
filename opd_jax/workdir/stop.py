"""Graceful shutdown: SIGTERM, SIGINT or a deadline set a flag that the loop polls between steps.

A thread receives the signals, because the main one may be inside a compilation for minutes. The first
signal asks for an end within a time limit; a second one, a second or more later, ends the process at
once. That does no damage: whatever a run writes is complete, or is cut off when it is resumed.
"""

import dataclasses
import math
import os
import signal
import sys
import threading
import time

from opd_jax.errors import AGAIN

GRACE_S = 300.0
_ONE_S = 1.0  # one Ctrl-C may arrive twice: from the terminal, and from the parent process
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass
class Stop:
    """Whether a run should end, and why.

    Attributes:
      reason: None, or the beginning of a sentence: "SIGTERM".
      grace_s: seconds after the first signal for the step in progress and its checkpoint; then the
        process ends.
      deadline_s: seconds after `began` by which the run must have saved and ended.
    """

    reason: str | None = None
    grace_s: float = GRACE_S
    deadline_s: float = math.inf
    began: float = dataclasses.field(default_factory=time.monotonic)

    def limit(self, section: object) -> None:
        """Set the limits from the config section `checkpoint`."""
        self.grace_s = section.grace_seconds  # type: ignore[attr-defined]
        minutes: float = section.deadline_minutes  # type: ignore[attr-defined]
        self.deadline_s = 60 * minutes if minutes else math.inf

    def mind_deadline(self, needed_s: float) -> None:
        """Set the flag where less than `needed_s` is left before the deadline."""
        left = self.deadline_s - (time.monotonic() - self.began)
        if self.reason is None and left < needed_s:
            self.reason = f"deadline in {max(left, 0.0):.0f} s"


def listen() -> Stop:
    """Return a `Stop` that this process's signals set. Call it in the main thread, before JAX starts."""
    stop = Stop()
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_receive, args=(stop, read), name="signals", daemon=True).start()
    return stop


def _receive(stop: Stop, pipe: int) -> None:
    first = math.inf
    while numbers := os.read(pipe, 64):
        now = time.monotonic()
        for number in numbers:
            if number not in _SIGNALS:
                continue
            name = signal.Signals(number).name
            if now - first > _ONE_S:
                _exit(f"{name} again: ended at once")
            elif first == math.inf:
                first, stop.reason = now, name
                text = f"killed, because the step in progress took more than {stop.grace_s:g} s"
                limit = threading.Timer(stop.grace_s, _exit, [f"{name}: {text}"])
                limit.daemon = True
                limit.start()
                _print(
                    f"{name}: finishing and saving the current step; send it again to end at once"
                )


def _exit(text: str) -> None:
    _print(f"{text}; run the same command again to resume from the last checkpoint")
    os._exit(AGAIN)


def _print(text: str) -> None:
    os.write(
        sys.stderr.fileno(), f"\n{text}\n".encode()
    )  # one write: the main thread may print too
