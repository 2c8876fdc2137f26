"""Answers graded a second with two processes: the usual mixture, and other problems' answers alone.

pytest -m slow -s tests/grading/test_speed.py on a quiet machine. Skipped where the files are absent.
"""

import random
import time

import pytest

from opd_jax.evaluation.benchmarks import BENCHMARKS, load
from opd_jax.grading import Grader
from tests.support.real_data import FILES, needs_data

pytestmark = [needs_data, pytest.mark.slow, pytest.mark.long]


def answers(name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(mixture, wrong): of each problem twice the gold's letters, once behind `x =`, once another's."""
    golds = [problem.answer for problem in load(BENCHMARKS[name], str(FILES[name])).problems]
    others = random.Random(0).sample(golds, len(golds))
    right = [(f"So \\boxed{{{gold}}}.", gold) for gold in golds]
    named = [
        (f"So \\boxed{{x = {gold}}}.", gold) for gold in golds if "=" not in gold
    ]  # nobody names an equation
    wrong = [(f"So \\boxed{{{other}}}.", gold) for other, gold in zip(others, golds, strict=True)]
    mixture = right + right + named + wrong
    random.Random(1).shuffle(mixture)
    return mixture, wrong


@pytest.mark.parametrize("name", ["math500", "minerva", "olympiad", "amc", "gsm8k"])
def test_two_hundred_ordinary_answers_a_second(name):
    rule = BENCHMARKS[name].rule
    rates = []
    for pairs in answers(name):
        with Grader(workers=2) as grader:  # processes that remember nothing of the answers before
            grader.grade([("\\boxed{2/1}", "1/2")] * 2)
            began = time.perf_counter()
            grades = grader.grade(pairs, rule=rule)
            rates.append(len(pairs) / (time.perf_counter() - began))
        late = sum(grade.value == "TIMEOUT" for grade in grades)
        print(f"\n{name}: {len(pairs)} answers, {rates[-1]:.0f} a second, {late} time-outs")
    assert rates[0] > 200
