"""Rewards from a user's function, called in processes of its own that can be killed."""

import contextlib
import dataclasses
import decimal
import json
import math
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opd_jax.errors import RewardError

ON_ERROR = ("stop", "leave_out")
_IMPORT_S = 300.0  # time limit for the import of the function's module
_CLOSED = "the reward processes were closed while they were in use"
_SPARE_S = 5.0  # the process ends itself at the time limit; the parent kills it so much later


@dataclasses.dataclass(frozen=True)
class Call:
    """What the function is asked about one problem: texts of its rollouts, and the problem's row for each.

    `problem` names the problem in messages.
    """

    problem: str
    texts: Sequence[str]
    row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CallResult:
    """Rewards of a call's rollouts, None each where `fault`, one line, says why there are none.

    `timed_out`: the fault is the time limit.
    """

    rewards: list[float | None]
    fault: str = ""
    timed_out: bool = False


class RewardPool:
    """Processes that call `module:function` with a time limit a call; a context manager.

    A call that exceeds `seconds` of wall-clock time ends its process and every program that the function
    started there; a new process takes its place. Time counts as it passes, not as the processor works,
    because a reward may wait for a sandbox or a server. `log` gets what the function prints.
    """

    def __init__(
        self,
        function: str,
        *,
        seconds: float,
        processes: int = 1,
        log: pathlib.Path | None = None,
    ):
        self.function, self.seconds, self.log = function, seconds, log
        self._workers = [_Worker(function, seconds, log) for _ in range(processes)]
        self._threads = ThreadPoolExecutor(max_workers=processes)
        self._closed = False

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a thread that waits for a reward gets a RewardError."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown()

    def start(self) -> str:
        """Start the processes and import the function; return "" or one line that says what is wrong."""
        for worker in self._workers:
            worker.spawn()
        faults = (worker.begin() for worker in self._workers)
        return next((self._line(fault) for fault in faults if fault), "")

    def rewards(self, calls: Sequence[Call]) -> list[CallResult]:
        """Call the function once for each problem and return the results, in the order of `calls`.

        Results do not depend on the number of processes. Raises RewardError where the pool is closed.
        """
        free, lock = list(self._workers), threading.Lock()

        def one(call: Call) -> CallResult:
            if self._closed:
                raise RewardError(_CLOSED)
            with lock:
                worker = free.pop()
            try:
                return self._outcome(call, worker.ask(call))
            finally:
                with lock:
                    free.append(worker)

        return list(self._threads.map(one, calls))

    def _outcome(self, call: Call, message: dict[str, Any]) -> CallResult:
        if self._closed:
            raise RewardError(_CLOSED)
        count = len(call.texts)
        if (rewards := message.get("rewards")) is not None:
            return CallResult(rewards)
        sample = message.get("sample")
        where = "" if sample is None else f", rollout {sample + 1} of {count}"
        fault = self._line(message["fault"], f", problem {call.problem}{where}")
        return CallResult([None] * count, fault, bool(message.get("timed_out")))

    def _line(self, fault: str, where: str = "") -> str:
        return f"reward.function={self.function}{where}: {fault}"


def make_pool(section: Any, *, log: pathlib.Path | None = None) -> RewardPool | None:
    """Make the pool of the config section `reward`; None where it names no function."""
    if not section.function:
        return None
    return RewardPool(
        section.function, seconds=section.seconds, processes=section.processes, log=log
    )


def fault_of(section: Any) -> str:
    """Return "" where the function of the config section `reward` can be imported, else one line."""
    pool = make_pool(section)
    if pool is None:
        return ""
    with pool:
        fault = pool.start()
    return f"{fault}; wanted module:function, found from this folder or installed" if fault else ""


def advice(log: pathlib.Path | None) -> str:
    """Return how a fault of the function can be corrected, for the end of its line."""
    seen = f" (its output is in {log})" if log is not None else ""
    return f"correct the function{seen}, or leave such rollouts out: --config.reward.on_error=leave_out"


class _Worker:
    """One process and the call that it is serving."""

    def __init__(self, function: str, seconds: float, log: pathlib.Path | None):
        self._function, self._seconds, self._log = function, seconds, log
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def spawn(self) -> None:
        """Start the process, without waiting for its imports."""
        with contextlib.ExitStack() as stack:
            output: Any = subprocess.DEVNULL
            if self._log is not None:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opd_jax.grading.reward_worker", self._function,
                 f"{self._seconds}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the run only; and its group can be killed
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "JAX_PLATFORMS": "cpu",  # a function that uses JAX must not take the run's devices
                },
            )  # fmt: skip
        self._ready = False

    def begin(self) -> str:
        """Wait until the function is imported; return "" or what is wrong with it."""
        if self._process is None or self._process.poll() is not None:
            self.spawn()
        message = self._receive(_IMPORT_S)
        self._ready = bool(message and message.get("ready"))
        if self._ready:
            return ""
        self.kill()
        if message is None:
            return f"its module was not imported within {_IMPORT_S:.0f} s, or its process ended"
        return message["fault"]

    def ask(self, call: Call) -> dict[str, Any]:
        """Return the answer about a problem: rewards or a fault. After a fault of the process it is new."""
        if not self._alive() and (fault := self.begin()):
            return {"fault": fault}
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"texts": list(call.texts), "rows": [call.row] * len(call.texts)}
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # a dead process shows when it is read from
            self._process.stdin.write(json.dumps(request, default=_plain).encode() + b"\n")
            self._process.stdin.flush()
        message = self._receive(self._seconds + _SPARE_S)
        if message is not None and _is_answer(message, len(call.texts)):
            return message
        late = time.monotonic() - started >= self._seconds
        self.kill()
        if message is not None:
            return {"fault": "its process wrote something that is not an answer"}
        if late:
            return {"fault": f"no answer after reward.seconds={self._seconds:g}", "timed_out": True}
        return {"fault": "its process ended before it answered"}

    def kill(self) -> None:
        """End the process, and every program that the function has started and left running."""
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()

    def _alive(self) -> bool:
        return self._ready and self._process is not None and self._process.poll() is None

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message; None where the process ended or is silent for so long."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        end, data = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                remaining = end - time.monotonic()
                if remaining <= 0 or self._process is not process:
                    return None
                if not selector.select(timeout=min(remaining, 0.5)):
                    continue
                try:
                    more = os.read(process.stdout.fileno(), 1 << 16)
                except ValueError:  # closed by `kill`, in another thread
                    return None
                if not more:
                    return None
                data += more
        return json.loads(data)


def _plain(value: Any) -> float | str:
    """Return a value of a row that JSON has no form for: a decimal as a number, a date or bytes as text."""
    return float(value) if isinstance(value, decimal.Decimal) else str(value)


def _is_answer(message: Any, count: int) -> bool:
    """Return whether a message has a fault, or as many numbers from 0 to 1 as there are rollouts."""
    if isinstance(message.get("fault"), str):
        return True
    rewards = message.get("rewards")
    return (
        isinstance(rewards, list)
        and len(rewards) == count
        and all(isinstance(x, float) and math.isfinite(x) and 0 <= x <= 1 for x in rewards)
    )
