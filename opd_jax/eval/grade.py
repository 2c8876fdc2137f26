"""Grading answers: whole numbers here, the rest by math-verify in processes that can be killed."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable
from enum import Enum
from types import TracebackType

from opd_jax.errors import GradingError
from opd_jax.eval.boxed import boxed_answer, same_whole_number

_WARM_UP_S = 60.0  # for the imports of a new process; not part of any answer's time


class Grade(Enum):
    """What became of an answer. The four are counted apart, never merged."""

    CORRECT = "CORRECT"
    WRONG = "WRONG"
    UNPARSED = "UNPARSED"
    TIMEOUT = "TIMEOUT"


class Grader:
    """A few grading processes with a hard time limit an answer; a context manager.

    A process that exceeds the limit is killed and replaced: a bomb costs one time-out, nothing else.
    """

    def __init__(self, *, workers: int = 2, timeout_s: float = 5.0):
        self.timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(workers)]

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()

    def grade(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        r"""Grades of (answer text, gold answer) pairs, in their order; the last \boxed{} counts."""
        given = list(pairs)
        found = [_at_once(*pair) for pair in given]
        grades = [grade or Grade.TIMEOUT for grade in found]
        todo = [(i, given[i]) for i, grade in enumerate(found) if grade is None][::-1]
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if todo:
                    worker.start(*todo.pop())
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while selector.get_map():
                busy = [key.data for key in selector.get_map().values()]
                ready = {key.data for key, _ in selector.select(timeout=0.1)}
                for worker in busy:
                    limit = self.timeout_s if worker.warm else _WARM_UP_S
                    if worker not in ready and time.monotonic() - worker.started <= limit:
                        continue
                    line = worker.stdout.readline() if worker in ready else ""
                    if line and not worker.warm:
                        worker.ask()  # the clock of the answer starts here
                        continue
                    if not worker.warm:
                        raise GradingError(
                            "a grading process ended, or said nothing for "
                            f"{_WARM_UP_S:.0f} s, before its first answer; "
                            "run python -m opd_jax.eval.grading_worker to see why"
                        )
                    selector.unregister(worker.stdout)
                    if line:
                        grades[worker.index] = Grade(line.strip())
                    else:  # too late, or the process died under the answer
                        worker.restart()
                    if todo:
                        worker.start(*todo.pop())
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return grades


def grade(answer_text: str, gold: str) -> Grade:
    """Grade one answer in a process of its own; for many, use `Grader`."""
    with Grader(workers=1) as grader:
        return grader.grade([(answer_text, gold)])[0]


def _at_once(text: str, gold: str) -> Grade | None:
    """The grade of what needs no math-verify: no box, or whole numbers; None for the rest."""
    answer = boxed_answer(text)
    if answer is None:
        return Grade.UNPARSED
    same = same_whole_number(answer, gold)
    return None if same is None else Grade.CORRECT if same else Grade.WRONG


class _Worker:
    """One grading process and the answer it is at work on."""

    def __init__(self) -> None:
        self._spawn()

    def _spawn(self) -> None:
        self.warm = False  # true once its first grade, of a trivial answer, is there
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd_jax.eval.grading_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.process.stdin is not None  # PIPE was asked for
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._send("\\boxed{1}", "1")

    def start(self, index: int, pair: tuple[str, str]) -> None:
        if self.process.poll() is not None:  # killed from outside since its last answer
            self.restart()
        self.index, self.pair, self.started = index, pair, time.monotonic()
        if self.warm:
            self.ask()

    def ask(self) -> None:
        self.warm, self.started = True, time.monotonic()
        self._send(*self.pair)

    def _send(self, text: str, gold: str) -> None:
        # A dead process shows as end of file when the answer is read.
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps({"text": text, "gold": gold}) + "\n")
            self.stdin.flush()

    def restart(self) -> None:
        self.kill()
        self._spawn()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
