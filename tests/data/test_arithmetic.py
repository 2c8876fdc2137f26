"""The generated problems: right, checked twice, and never shared between training and test."""

import re

import numpy as np
import pytest

from opd_jax.data import Problem, arithmetic

WORDS = {"add": "+", "subtract": "-", "multiply by": "*"}
STEP = re.compile(r"(-?\d+)([+*-])(\d+)=(-?\d+)")
COUNT = 3000


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Problem]]:
    return {
        split: [arithmetic.problem(split, i) for i in range(COUNT)] for split in arithmetic.SPLITS
    }


@pytest.fixture(scope="module")
def every(problems) -> list[Problem]:
    return [problem for split in problems.values() for problem in split]


def steps_of(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """Start and steps as the prompt's words say."""
    start, *rest = prompt.removesuffix(".").split(", ")
    assert start.startswith("Start with ")
    steps = [tuple(part.rsplit(" ", 1)) for part in rest]
    return int(start.split()[-1]), [(WORDS[word], int(number)) for word, number in steps]


def calculate(value: int, sign: str, operand: int) -> int:
    if sign == "*":
        return value * operand
    return value + operand if sign == "+" else value - operand


def chain(prompt: str) -> list[int]:
    """Every value on the way."""
    value, steps = steps_of(prompt)
    values = [value]
    for sign, operand in steps:
        values.append(calculate(values[-1], sign, operand))
    return values


def derivations(solution: str) -> list[list[tuple[int, str, int, int]]]:
    """Each line but the last as its written steps (left, sign, right, result)."""
    return [
        [(int(a), sign, int(b), int(c)) for a, sign, b, c in STEP.findall(line)]
        for line in solution.split("\n")[:-1]
    ]


def test_a_problem_by_hand():
    assert steps_of("Start with 7, add 5, multiply by 3, subtract 8.") == (
        7, [("+", 5), ("*", 3), ("-", 8)],
    )  # fmt: skip
    assert chain("Start with 7, add 5, multiply by 3, subtract 8.") == [7, 12, 36, 28]


def test_a_problem_is_a_function_of_split_and_index(problems):
    assert [arithmetic.problem("train", i) for i in range(50)][::-1] == problems["train"][49::-1]
    assert problems["train"][7].id == "tiny-train-7"
    assert problems["train"][7].prompt != problems["sft"][7].prompt


def test_no_text_of_the_test_split_is_trained_on(problems):
    texts = {split: {p.prompt for p in some} for split, some in problems.items()}
    assert texts["test"].isdisjoint(texts["train"] | texts["sft"] | texts["careless"])
    assert all(len(prompts) > COUNT / 2 for prompts in texts.values())  # and seldom repeat one


def test_ids_are_unique(every):
    assert len({p.id for p in every}) == len(arithmetic.SPLITS) * COUNT


def test_answers_are_right(every):
    for problem in every:
        assert problem.answer == str(chain(problem.prompt)[-1]), problem
        assert problem.solution.split("\n")[-1] == f"\\boxed{{{problem.answer}}}", problem
        assert problem.solution.count("\\boxed") == 1


def test_values_stay_in_range(every):
    for problem in every:
        assert all(0 <= value <= 99 for value in chain(problem.prompt)), problem
        written = [step[3] for line in derivations(problem.solution) for step in line]
        assert all(0 <= value <= 99 for value in written), problem


def test_derivations_follow_the_prompt(every):
    for problem in every:
        start, steps = steps_of(problem.prompt)
        for line in derivations(problem.solution):
            assert [(sign, right) for _, sign, right, _ in line] == steps, problem
            lefts, results = [s[0] for s in line], [s[3] for s in line]
            assert lefts == [start, *results[:-1]], problem  # a slip carries on


def test_two_derivations_agree_on_the_answer(every):
    for problem in every:
        results = [line[-1][3] for line in derivations(problem.solution)]
        assert len(results) in (2, 3, 4), problem
        assert results[-1] == int(problem.answer), problem
        assert results.count(results[-1]) == 2, problem  # and it stopped at once
        openings = [line.split(":")[0] for line in problem.solution.split("\n")[1:-1]]
        assert openings == ["Check", "Wait", "Wait"][: len(results) - 1], problem


def slip_share(problems):
    steps = [step for p in problems for line in derivations(p.solution) for step in line]
    return sum(calculate(*step[:3]) != step[3] for step in steps) / len(steps)


@pytest.mark.parametrize("split", ["train", "sft", "test"])
def test_slips_are_made_and_caught(problems, split):
    # 0.03 of the written steps, less those that made no two derivations agree
    assert 0.02 < slip_share(problems[split]) < 0.035
    third = np.mean([len(derivations(p.solution)) >= 3 for p in problems[split]])
    # two derivations of 2 or 3 steps, any step may slip: 1 - 0.97^5 = 0.14
    assert 0.10 < third < 0.18


def test_the_careless_split_slips_more(problems):
    # 0.3 of the steps, less the solutions in which no two of four derivations agree on the answer
    assert 0.1 < slip_share(problems["careless"]) < 0.3


def test_lengths_and_signs_vary(every):
    counts = {n: sum(len(steps_of(p.prompt)[1]) == n for p in every) for n in (2, 3)}
    assert counts[2] + counts[3] == len(every)
    assert min(counts.values()) > 0.4 * len(every)
    signs = {sign for p in every for sign, _ in steps_of(p.prompt)[1]}
    assert signs == {"+", "-", "*"}
