r"""The embedded data set `tiny`: multi-step arithmetic with written-out, double-checked solutions.

A problem is a chain such as "Start with 7, add 5, multiply by 3, subtract 8." The golden solution
derives the result step by step, derives it again, and repeats this until two derivations agree;
then it boxes the answer:

    7+5=12; 12*3=36; 36-8=28.
    Check: 7+5=12; 12*3=37; 37-8=29.
    Wait: 7+5=12; 12*3=36; 36-8=28.
    \boxed{28}

Some of the written steps are wrong on purpose (`SLIP_RATE`). They are the reason for checking, and they
give solutions a natural reason to grow, which length inflation depends on. In the split `careless` wrong
steps are common; the last training data of the embedded student came from it.
"""

import zlib

import numpy as np

from opd_jax.data.problem import Problem

SPLITS = ("train", "sft", "test", "careless")  # the index seeds the split: append new ones
# Share of golden steps that are wrong and that a later derivation corrects.
SLIP_RATE = {"train": 0.03, "sft": 0.03, "careless": 0.4, "test": 0.03}
MAX_VALUE = 99  # every intermediate result lies in 0..MAX_VALUE
MAX_DERIVATIONS = 4
TEST_SIZE = 200  # problems of a generated test set of which all are wanted
_WORDS = {"+": "add", "-": "subtract", "*": "multiply by"}


def problem(split: str, index: int) -> Problem:
    """Return the `index`-th problem of a split, a pure function of its arguments.

    The text's checksum decides whether it belongs to `test` or to the training splits, so no test
    problem is ever trained on.
    """
    generator = np.random.Generator(np.random.Philox(key=[SPLITS.index(split), index]))
    while True:
        start, steps = _chain(generator)
        words = ", ".join(f"{_WORDS[sign]} {operand}" for sign, operand in steps)
        prompt = f"Start with {start}, {words}."
        if (zlib.crc32(prompt.encode()) % 16 == 0) == (split == "test"):
            break
    solution, answer = _solution(generator, start, steps, SLIP_RATE[split])
    return Problem(f"tiny-{split}-{index}", prompt, solution, answer)


def _apply(value: int, sign: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[sign]


def _chain(generator: np.random.Generator) -> tuple[int, list[tuple[str, int]]]:
    """Draw a start and 2 or 3 steps whose intermediate results stay in 0..MAX_VALUE."""
    start = value = int(generator.integers(2, 30))
    steps: list[tuple[str, int]] = []
    count = int(generator.integers(2, 4))
    while len(steps) < count:
        sign = "+-*"[generator.integers(3)]
        operand = int(generator.integers(2, 6 if sign == "*" else 20))
        if 0 <= (result := _apply(value, sign, operand)) <= MAX_VALUE:
            steps.append((sign, operand))
            value = result
    return start, steps


def derivation(
    generator: np.random.Generator, start: int, steps: list[tuple[str, int]], slip_rate: float
) -> tuple[str, int]:
    """Return one written derivation and its result; a slip affects all later steps."""
    while True:
        value, written = start, []
        for sign, operand in steps:
            result = _apply(value, sign, operand)
            if generator.random() < slip_rate:
                result += int(generator.integers(1, 10)) * (1 if generator.random() < 0.5 else -1)
            written.append(f"{value}{sign}{operand}={result}")
            value = result
            if not 0 <= value <= MAX_VALUE:  # a slip has left the range: start again
                break
        else:
            return "; ".join(written) + ".", value


def _solution(
    generator: np.random.Generator, start: int, steps: list[tuple[str, int]], slip_rate: float
) -> tuple[str, str]:
    answer = derivation(generator, start, steps, 0.0)[1]
    while True:
        text = ""
        results: list[int] = []
        while len(results) < MAX_DERIVATIONS:
            line, result = derivation(generator, start, steps, slip_rate)
            text += ("", "Check: ", "Wait: ")[min(len(results), 2)] + line + "\n"
            if result in results:
                if result == answer:
                    return text + f"\\boxed{{{answer}}}", str(answer)
                break
            results.append(result)
