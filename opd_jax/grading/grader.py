"""Grade answers: integers in this process, others by math-verify in processes that can be killed."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable
from enum import Enum
from typing import Any

from opd_jax.errors import GradingError
from opd_jax.grading.boxed import same_whole_number
from opd_jax.grading.extract import Found, find, same_letters

_WARM_UP_S = 60.0  # for the imports of a new process; not part of any answer's time
_PATIENCE = 20.0  # wall seconds allowed per second of processor time, in case a process sleeps
_MOST_PROCESSES = 8  # limit of the default number; each process holds sympy in memory


class Grade(Enum):
    """The outcome of an answer. The four are counted separately and never merged."""

    CORRECT = "CORRECT"
    WRONG = "WRONG"
    UNPARSED = "UNPARSED"
    TIMEOUT = "TIMEOUT"


class Grader:
    """A pool of grading processes with a hard time limit per answer; a context manager.

    A process that exceeds the limit ends and is replaced, so a hostile answer costs one time-out and nothing
    else. `timeout_s` is in seconds of processor time, so that a grade does not depend on the load of the
    machine. `workers` = 0 starts one process per core, 8 at most. `verdict`, one of extract.GRADERS (config:
    grading.grader), selects how equivalence is decided.
    """

    def __init__(self, *, workers: int = 0, timeout_s: float = 5.0, verdict: str = "guarded"):
        self.timeout_s, self.verdict, self._closed = timeout_s, verdict, False
        self._count = workers or min(_cores(), _MOST_PROCESSES)
        self._workers: list[_Worker] = []  # started for the first answer that needs one

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes, unless they run; the first answer that needs one does so too."""
        if not self._workers and not self._closed:
            self._workers = [_Worker(self.timeout_s) for _ in range(self._count)]

    def close(self) -> None:
        """End the processes; a thread that is grading gets a GradingError."""
        self._closed = True
        for worker in self._workers:
            worker.kill()

    def grade(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        fallbacks: tuple[str, ...] = (),
        rule: str = "plain",
    ) -> list[Grade]:
        r"""Grade (answer text, gold answer) pairs, in their order; the last \boxed{} counts.

        Without a box the `fallbacks` (extract.FALLBACKS) are tried in their order. `rule`, one of
        extract.RULES, selects how answers are compared.
        """
        answers = [(find(text, fallbacks), gold) for text, gold in pairs]
        immediate = [_at_once(answer, gold, self.verdict) for answer, gold in answers]
        grades = [grade or Grade.TIMEOUT for grade in immediate]
        todo: list[tuple[int, dict]] = []
        for i, (answer, gold) in reversed(list(enumerate(answers))):
            if immediate[i] is None and answer is not None:
                todo.append((i, _request(answer, gold, rule, self.verdict)))
        if todo:
            self.start()
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if todo:
                    worker.start(*todo.pop())
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while selector.get_map():
                busy = [key.data for key in selector.get_map().values()]
                ready = {key.data for key, _ in selector.select(timeout=0.1)}
                for worker in busy:
                    limit = _PATIENCE * self.timeout_s if worker.warm else _WARM_UP_S
                    if worker not in ready and time.monotonic() - worker.started <= limit:
                        continue
                    line = worker.stdout.readline() if worker in ready else ""
                    if line and not worker.warm:
                        worker.ask()  # the time limit of the answer starts here
                        continue
                    if not worker.warm:
                        raise GradingError(
                            "a grading process ended, or did not respond for "
                            f"{_WARM_UP_S:.0f} s, before its first answer; "
                            "run python -m opd_jax.grading.worker to see why"
                        )
                    if self._closed:
                        raise GradingError("the grader was closed while it was grading")
                    selector.unregister(worker.stdout)
                    if line:
                        grades[worker.index] = Grade(line.strip())
                    else:  # it timed out, or the answer killed the process
                        worker.restart()
                    if todo:
                        worker.start(*todo.pop())
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return grades

    def grade_answered(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        fallbacks: tuple[str, ...] = (),
        rule: str = "plain",
    ) -> list[Grade | None]:
        """Grade the pairs that have a gold answer; None for those whose gold answer is ""."""
        pairs = list(pairs)
        answered = [pair for pair in pairs if pair[1]]
        grades = iter(self.grade(answered, fallbacks=fallbacks, rule=rule))
        return [next(grades) if gold else None for _, gold in pairs]


def make_grader(section: Any) -> Grader:
    """Make the grader of the config section `grading`."""
    return Grader(workers=section.processes, timeout_s=section.seconds, verdict=section.grader)


def decided(grade: Grade | None) -> bool:
    """Return whether a grade judges the answer: TIMEOUT depends on the machine."""
    return grade is not None and grade is not Grade.TIMEOUT


def grade(answer_text: str, gold: str) -> Grade:
    """Grade one answer in a process of its own; for many, use `Grader`."""
    with Grader(workers=1) as grader:
        return grader.grade([(answer_text, gold)])[0]


def _at_once(answer: Found | None, gold: str, verdict: str) -> Grade | None:
    """Grade a missing answer, integers and answers with the gold's letters; None if it needs math-verify."""
    if answer is None:
        return Grade.UNPARSED
    if answer.free:
        return None
    same = same_whole_number(answer.text, gold)
    if same is None and verdict == "guarded" and same_letters(answer.text, gold):
        return Grade.CORRECT
    return None if same is None else Grade.CORRECT if same else Grade.WRONG


def _cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _request(answer: Found, gold: str, rule: str, verdict: str = "guarded") -> dict:
    return {
        "answer": answer.text, "free": answer.free, "gold": gold, "rule": rule, "grader": verdict,
    }  # fmt: skip


class _Worker:
    """One grading process and the answer that it is grading."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._spawn()

    def _spawn(self) -> None:
        self.warm = False  # true once it has graded its first, trivial answer
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd_jax.grading.worker", f"{self._timeout_s}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to the run only: it must not change a grade
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.process.stdin is not None  # because of PIPE
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._send(_request(Found("2/1"), "2", "plain"))

    def start(self, index: int, request: dict) -> None:
        if self.process.poll() is not None:  # killed from outside after its last answer
            self.restart()
        self.index, self.request, self.started = index, request, time.monotonic()
        if self.warm:
            self.ask()

    def ask(self) -> None:
        self.warm, self.started = True, time.monotonic()
        self._send(self.request)

    def _send(self, request: dict) -> None:
        # A dead process shows as end of file when the answer is read.
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps(request) + "\n")
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
