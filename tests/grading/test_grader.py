"""Answers of every kind, and answers that attack: each costs itself and nothing else."""

import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from opd_jax.config.fields import default
from opd_jax.errors import GradingError
from opd_jax.grading import Grade, Grader
from opd_jax.grading import worker as grading_worker
from opd_jax.grading.boxed import boxed_answer, last_boxed, same_whole_number
from opd_jax.grading.grader import make_grader

grading = importlib.import_module(
    "opd_jax.grading.grader"
)  # the package has a function of that name
CORRECT, WRONG, UNPARSED, TIMEOUT = Grade
BOMB = (r"\boxed{9^{9^{9^9}}}", "3")  # math-verify evaluates it: a number of 10^(10^8) digits
RIGHT = (r"so it is \boxed{3.0}", "3")  # not plainly a whole number: a process has to say
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout_s=TIMEOUT_S) as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} {x}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{\frac{1}{2}", None),  # the text ends inside its last box
        (r"\boxed{5}, so \boxed{", None),
        (r"\boxed{5}, so \boxed{5", None),
        (r"\boxed{5}, so \boxed{\text{five}", None),
        (r"<think>\boxed{5</think> \boxed{6}", "6"),  # an open box before the last one
        (r"\boxed{5} and {x", "5"),
        (r"\boxed{5}, so \boxed", "5"),  # no box was opened
        (r"\boxed{5}, so \boxe", "5"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{\boxed{}", ""),
        (r"} {\boxed{7}", "7"),
        (r"boxed{7} \fbox{7} 7", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_takes_linear_time():
    start = time.process_time()
    assert last_boxed("\\boxed{" * 150_000) is None  # a megabyte, as a looping model writes it
    assert last_boxed("\\boxed{3}" + "{" * 1_000_000) == "3"
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("7", "7", True), ("007", "7", True), ("+7", "7", True), ("-0", "0", True),
        ("7", "-7", False), ("7", "8", False),
        ("9" * 20, "9" * 20, True), ("9" * 20, "9" * 19 + "8", False),
        ("9" * 21, "9" * 21, None), ("7.0", "7", None), ("7", "7.0", None), ("7", "1/2", None),
        (" 7", "7", None), ("7\n", "7", None), ("--7", "7", None), ("+", "7", None), ("", "7", None),
        ("7", "", None), ("1,000", "1000", None), ("\u0667", "7", None), ("7%", "7", None),
    ],
)  # fmt: skip
def test_same_whole_number(answer, gold, same):
    assert same_whole_number(answer, gold) is same


def test_whole_numbers_get_the_grade_of_math_verify():
    """Signs, leading zeros, near misses, up to 20 digits; math-verify run here, on each of 400 pairs."""
    draw = random.Random(0)

    def number() -> str:
        digits = draw.choices("0123456789", k=draw.choice([1, 1, 2, 3, 8, 16, 19, 20]))
        return draw.choice(["", "", "-", "+"]) + "".join(digits)

    seen = set()
    for _ in range(400):
        gold = number()
        value = int(gold)
        others = [str(value), f"{value:+}", str(-value), str(value + 1), f"{value:015}", number()]
        answer = draw.choice([other for other in others if len(other.lstrip("+-")) <= 20])
        same = same_whole_number(answer, gold)
        seen.add(same)
        by_math_verify = grading_worker.grade(f"\\boxed{{{answer}}}", gold)
        assert by_math_verify == {True: "CORRECT", False: "WRONG"}[same], (answer, gold)
    assert seen == {True, False}


def test_boxed_answer_leaves_out_what_is_none():
    assert boxed_answer(r"\boxed{7}") == "7"
    assert boxed_answer("\\boxed{" + "1" * 20_000 + "}") == "1" * 20_000
    for text in ("7", r"\boxed{}", "\\boxed{ \n}", "\\boxed{" + "1" * 20_001 + "}"):
        assert boxed_answer(text) is None


def test_the_parent_does_not_import_sympy():
    code = "import sys, opd_jax.train; assert not {'sympy', 'math_verify'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_grading_process_does_not_import_jax():
    code = "import sys, opd_jax.grading.worker; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


ANSWERS = [
    (r"\boxed{142}", "142", CORRECT),
    (r"\boxed{142.0}", "142", CORRECT),
    (r"\boxed{143}", "142", WRONG),
    (r"\boxed{142", "142", UNPARSED),
    ("142", "142", UNPARSED),  # not in a box
    (r"\boxed{}", "142", UNPARSED),
    (r"\boxed{ }", "142", UNPARSED),
    (r"\boxed{0.5}", "1/2", CORRECT),
    (r"\boxed{\frac{1}{2}}", "0.5", CORRECT),
    (r"\boxed{\frac{1}{3}}", "0.5", WRONG),
    (r"\boxed{(1,2)}", "1<x<2", CORRECT),
    (r"\boxed{1<x<2}", "(1,2)", CORRECT),  # math-verify alone allows the other way round only
    (r"\boxed{5}, no: \boxed{", "5", UNPARSED),  # the text ends inside its last box
    (r"\boxed{5}, again \boxed{5", "5", UNPARSED),
    (r"\boxed{5}, no: \boxed{6}", "5", WRONG),  # the last box counts
    (r"\boxed{5}, no: \boxed{6}", "6", CORRECT),
    (r"\boxed{6}<|im_end|>", "6", CORRECT),  # an end token after the box does not hide it
    (r"\boxed{" + "1" * 30_000 + "}", "1", UNPARSED),  # too long to be an answer
    (r"\boxed{" * 150_000, "3", UNPARSED),
    (r"\boxed{" + "{" * 500_000 + "}" * 500_000 + "}", "3", UNPARSED),
    ("\u0000 \ud83d\ude00 \n\\boxed{3}\n", "3", CORRECT),
]


def test_grades_in_order(grader):
    expected = [grade for _, _, grade in ANSWERS]
    pairs = [(text, gold) for text, gold, _ in ANSWERS]
    assert grader.grade(iter(pairs)) == expected
    assert grader.grade(pairs[::-1]) == expected[::-1]
    assert grader.grade([]) == []


def test_a_bomb_costs_its_own_grade_and_no_other(grader):
    grades = grader.grade([RIGHT, BOMB, BOMB, RIGHT, (r"\boxed{4.0}", "3"), RIGHT])
    assert grades == [CORRECT, TIMEOUT, TIMEOUT, CORRECT, WRONG, CORRECT]
    # Both processes are new now. The imports of a new one are not part of the bomb's time.
    assert grader.grade([BOMB, RIGHT]) == [TIMEOUT, CORRECT]


@pytest.mark.slow
def test_bombs_cost_one_time_out_together(grader):
    grader.grade([RIGHT, RIGHT])
    start = time.monotonic()
    assert grader.grade([BOMB, BOMB, RIGHT]) == [TIMEOUT, TIMEOUT, CORRECT]
    assert TIMEOUT_S < time.monotonic() - start < TIMEOUT_S + 20
    start = time.monotonic()
    assert grader.grade([BOMB, RIGHT]) == [TIMEOUT, CORRECT]
    assert time.monotonic() - start < TIMEOUT_S + 20


@pytest.mark.slow
def test_a_busy_machine_gives_the_grades_of_an_idle_one():
    """The limit is of processor time: a process that waits for a core does not use it up."""
    with Grader(workers=1, timeout_s=0.5) as grader:
        grader.start()
        assert grader.grade([RIGHT]) == [CORRECT]
        pid = grader._workers[0].process.pid
        os.kill(pid, signal.SIGSTOP)  # others have the core, for three times the limit
        threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
        start = time.monotonic()
        assert grader.grade([(r"\boxed{5.0}", "5")]) == [CORRECT]
        assert time.monotonic() - start > 1.0
        assert grader._workers[0].process.pid == pid
        assert grader.grade([BOMB]) == [TIMEOUT]


@pytest.mark.slow
def test_a_process_that_sleeps_is_given_up(monkeypatch):
    monkeypatch.setattr(grading, "_PATIENCE", 2.0)
    with Grader(workers=1, timeout_s=0.5) as grader:
        grader.start()
        assert grader.grade([RIGHT]) == [CORRECT]
        os.kill(grader._workers[0].process.pid, signal.SIGSTOP)
        assert grader.grade([(r"\boxed{5.0}", "5"), RIGHT]) == [TIMEOUT, CORRECT]


@pytest.mark.parametrize(
    ("cores", "asked", "count"), [(1, 0, 1), (3, 0, 3), (64, 0, 8), (64, 2, 2)]
)
def test_as_many_processes_as_cores_unless_a_number_is_asked_for(monkeypatch, cores, asked, count):
    monkeypatch.setattr(grading, "_cores", lambda: cores)
    monkeypatch.setattr(grading, "_Worker", lambda timeout_s: timeout_s)
    section = default().grading
    section.processes, section.seconds = asked, 2.5
    grader = make_grader(section)
    assert grader._workers == []  # until an answer needs them
    grader.start()
    assert grader._workers == [2.5] * count


def test_what_has_no_gold_answer_has_no_grade(grader):
    given = [(r"\boxed{3}", "3"), (r"\boxed{3}", ""), ("", "3"), (r"\boxed{4}", "3")]
    assert grader.grade_answered(iter(given)) == [CORRECT, None, UNPARSED, WRONG]


@pytest.mark.slow
def test_a_process_killed_from_outside_is_replaced(grader):
    grader.start()
    grader.grade([RIGHT, RIGHT])
    for worker in grader._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    assert grader.grade([RIGHT] * 5) == [CORRECT] * 5


@pytest.mark.slow
def test_a_process_killed_at_work_costs_its_answer():
    with Grader(workers=1, timeout_s=60.0) as grader:
        grader.start()
        assert grader.grade([RIGHT]) == [CORRECT]
        kill = threading.Timer(0.5, os.kill, (grader._workers[0].process.pid, signal.SIGKILL))
        kill.start()
        start = time.monotonic()
        assert grader.grade([BOMB, RIGHT]) == [TIMEOUT, CORRECT]
        assert time.monotonic() - start < 30


def test_close_ends_the_processes():
    with Grader(workers=2) as grader:
        grader.start()
        processes = [worker.process for worker in grader._workers]
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)
    grader.close()  # twice is no error


def test_processes_that_cannot_start_are_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Grader(workers=1) as grader:
        assert grader.grade([(r"\boxed{1}", "1"), ("1", "1")]) == [CORRECT, UNPARSED]  # needs none
        with pytest.raises(GradingError, match=r"grading\.worker"):
            grader.grade([RIGHT])
