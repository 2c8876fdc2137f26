"""Golden solutions of published files against their own answers, and against those of other problems.

The exceptions are those of docs/evaluation.md, each with its cause. Skipped where the files are absent.
"""

import random
import time

import pytest

from opd_jax import data
from opd_jax.evaluation.benchmarks import BENCHMARKS, load
from opd_jax.grading import Grade, Grader, worker
from opd_jax.grading.boxed import last_boxed
from opd_jax.grading.extract import Found, same_letters
from tests.support.real_data import FILES, LUFFY, TRAINING, needs_data

pytestmark = [needs_data, pytest.mark.slow, pytest.mark.long]
LUFFYS = {f"luffy-{name}": name for name in FILES if name != "gsm8k"}


def problems_of(name):
    if name in TRAINING:
        opened = data.open_problems(
            str(TRAINING[name]), field="x", bad_rows="skip", need_answer=True
        )
        return opened[:], "plain"
    benchmark = BENCHMARKS[LUFFYS.get(name, name)]
    file = LUFFY if name in LUFFYS else FILES[name]
    return load(benchmark, str(file)).problems, benchmark.rule


def golden(problem):
    """The golden solution where it has a box, else the answer in a box."""
    if last_boxed(problem.solution):
        return problem.solution
    return f"\\boxed{{{problem.answer}}}"


@pytest.mark.parametrize("name", [*FILES, *LUFFYS, *TRAINING])
def test_golden_solutions(name):
    problems, rule = problems_of(name)
    pairs = [(golden(problem), problem.answer) for problem in problems]
    draw = random.Random(0)
    order = list(range(len(problems)))
    draw.shuffle(order)
    # Of large files a part: these are the slow ones, wrong and never the same letters.
    drawn = list(enumerate(order[:1000]))
    # A pair of problems with one answer is rightly CORRECT (DeepMath asks so often for 0, 1, 2 and Yes that
    # it is one pair in 17): such pairs are counted apart, and the limit is for the others.
    unequal = [(i, j) for i, j in drawn if not same_letters(problems[i].answer, problems[j].answer)]
    others = [(pairs[i][0], problems[j].answer) for i, j in unequal]
    with Grader() as grader:
        began = time.perf_counter()
        grades = grader.grade(pairs, rule=rule)
        rate = len(pairs) / (time.perf_counter() - began)
        shuffled = grader.grade(others, rule=rule)
    wrong = [(p.id, g.name, p.answer) for p, g in zip(problems, grades, strict=True)
             if g is not Grade.CORRECT]  # fmt: skip
    right = 1 - len(wrong) / len(problems)
    chance = sum(grade is Grade.CORRECT for grade in shuffled) / len(others)
    equal = len(drawn) - len(others)
    found = [(problems[i].answer, problems[j].answer)
             for (i, j), grade in zip(unequal, shuffled, strict=True) if grade is Grade.CORRECT]  # fmt: skip
    right_at_all = (equal + len(found)) / len(drawn)
    print(
        f"\n{name}: {len(problems)} problems, {right:.2%} CORRECT, {rate:.0f} answers/s; not correct: "
        f"{wrong}\n  shuffled, {len(drawn)} pairs: {right_at_all:.2%} CORRECT, {equal} of them with equal "
        f"letters; {chance:.2%} of the others: {found}"
    )
    assert right >= 0.995
    assert chance <= 0.03


@pytest.mark.parametrize("name", ["math500", "minerva", "olympiad"])
def test_golden_answers_without_the_rule_of_equal_letters(name, monkeypatch):
    """What math-verify and the rules of units and lists make of them, no short cut taken."""
    monkeypatch.setattr(worker, "same_letters", lambda answer, gold: False)
    problems, rule = problems_of(name)
    wrong = [
        (problem.id, problem.answer)
        for problem in problems
        if worker.compare(Found(last_boxed(golden(problem))), problem.answer, rule) != "CORRECT"
    ]
    print(f"\n{name}: {1 - len(wrong) / len(problems):.2%} CORRECT by math-verify; not: {wrong}")
    assert len(wrong) <= 0.005 * len(problems)
