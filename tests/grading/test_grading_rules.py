r"""Units, lists of answers, fall-backs: the rules of the benchmarks, through the processes that grade."""

import time

import pytest

from opd_jax.grading import Grade, Grader, worker
from tests.support.lanes import slow

CORRECT, WRONG, UNPARSED, TIMEOUT = Grade
BOMB = r"9^{9^{9^9}}"


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout_s=3.0) as grader:
        yield grader


def check(grader, cases, **options):
    grades = grader.grade([(f"\\boxed{{{a}}}", gold) for a, gold, _ in cases], **options)
    assert [(*case[:2], g.name) for case, g in zip(cases, grades, strict=True)] == [
        (a, gold, want.name) for a, gold, want in cases
    ]


def test_units_and_powers_of_ten(grader):
    check(grader, [
        (r"1.6 \mathrm{~cm}", "1.6", CORRECT),
        (r"1.6 \text{ cm}", "1.6", CORRECT),
        (r"4.5 \times 10^{33}", "4.5e33", CORRECT),
        (r"4.5 \times 10^{33} \ \mathrm{erg/s}", "4.5e33", CORRECT),
        (r"4.6 \times 10^{33}", "4.5e33", WRONG),
        (r"2.55 \times 10^{-10}", "2.55e-10", CORRECT),
        (r"3.3 \times 10^{-10}", "2.55e-10", WRONG),  # math-verify rounds both to 0
        ("-0.33333", "-1./3", CORRECT),
        (r"-\frac{1}{3}", "-1./3", CORRECT),
        (r"\lambda = 0.5 \mathrm{~m}", "0.5", CORRECT),
        (r"\arcsin(10/13)", "np.arcsin(10/13)", CORRECT),
        (r"0.877 \text{ rad}", "np.arcsin(10/13)", WRONG),  # 0.8776: three digits of a symbolic answer
        (r"\frac{e^{at} - e^{-at}}{2a}", r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})", CORRECT),
        (r"\frac{e^{at} + e^{-at}}{2a}", r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})", WRONG),
        (r"\arcsin(1.3 \sin\theta_w)", r"\arcsin{1.3 \sin{\theta_w}}", CORRECT),
        ("400,000", "400000", CORRECT),
        ("40", "4", WRONG),
        ("2*3", "6", CORRECT),
        ("2*3", "23", WRONG),
        ("3*10^8", "3e8", CORRECT),
        (r"\text{none}", "4", WRONG),
    ], rule="units")  # fmt: skip


def test_lists_of_answers_in_any_order(grader):
    check(grader, [
        ("3, 1", "1,3", CORRECT),
        (r"\{1, 3\}", "1,3", CORRECT),
        (r"1 \text{ and } 3", "1,3", CORRECT),
        (r"x = 1 \text{ or } x = 3", "1,3", CORRECT),
        ("1", "1,3", WRONG),
        ("1, 3, 5", "1,3", WRONG),
        ("1, 1", "1,3", WRONG),
        ("-2", "-2,-2", WRONG),
        (r"(4,5,7), (1,8,19), (2,7,13)", "$(1,8,19), (2,7,13), (4,5,7)$", CORRECT),
        (r"(5,4,7), (1,8,19), (2,7,13)", "$(1,8,19), (2,7,13), (4,5,7)$", WRONG),
        ("84, 69", "$69$,$84$", CORRECT),
        (r"\frac{3 - \sqrt{21}}{2}, 1, \frac{3 + \sqrt{21}}{2}",
         r"$1$,$\frac{3 + \sqrt{21}}{2}$,$\frac{3 - \sqrt{21}}{2}$", CORRECT),
        (r"1, \frac{3 \pm \sqrt{21}}{2}",
         r"$1$,$\frac{3 + \sqrt{21}}{2}$,$\frac{3 - \sqrt{21}}{2}$", CORRECT),
        ("f(x)=2-x, f(x)=x", "$f(x)=x$,$f(x)=2-x$", CORRECT),
        (r"0.5", r"$\frac{1}{2}$", CORRECT),
        (r"\frac{1}{3}", r"$\frac{1}{2}$", WRONG),
    ], rule="several")  # fmt: skip


def test_fall_backs(grader):
    texts = ["Answer: 7", "<think>5</think>\nIt is 7.", r"\boxed{7} Answer: 8", "seven"]
    pairs = [(text, "7") for text in texts]
    assert grader.grade(pairs) == [UNPARSED, UNPARSED, CORRECT, UNPARSED]
    assert grader.grade(pairs, fallbacks=("answer_line",)) == [CORRECT, UNPARSED, CORRECT, UNPARSED]
    assert grader.grade(pairs, fallbacks=("after_think",)) == [UNPARSED, CORRECT, CORRECT, UNPARSED]
    both = ("answer_line", "after_think")
    assert grader.grade(pairs, fallbacks=both) == [CORRECT, CORRECT, CORRECT, UNPARSED]


@pytest.mark.parametrize("rule", ["units", *slow("several")])
def test_bombs_under_every_rule(grader, rule):
    assert_bombs_are_defused(grader, rule)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["units", "several"])
def test_bombs_end_in_time_under_every_rule(grader, rule):
    start = time.monotonic()
    assert_bombs_are_defused(grader, rule)
    assert time.monotonic() - start < 60


def assert_bombs_are_defused(grader, rule: str) -> None:
    good = (r"\boxed{0.5}", "1/2")
    deep = "\\boxed{" + "{" * 500_000 + "1" + "}" * 500_000 + "}"
    grades = grader.grade([good, (f"\\boxed{{{BOMB}}}", "3.5"), (deep, "3.5"), good], rule=rule)
    assert grades[:1] + grades[2:] == [CORRECT, UNPARSED, CORRECT]
    assert grades[1] in (TIMEOUT, UNPARSED, WRONG)  # sympy may see that it is too large
    free = grader.grade(
        [("</think> " + f"${BOMB}$", "3"), good], fallbacks=("after_think",), rule=rule
    )
    assert free[1] == CORRECT


@pytest.mark.slow
def test_what_differs_plainly_is_what_math_verify_calls_wrong():
    """The short cut and math-verify, on every pair of these expressions."""
    some = ["1", "1.5", r"\frac{3}{2}", "0.33333333", r"\frac{1}{3}", "x", "x+1", "1+x", "x^2-1",
            "(x-1)(x+1)", r"\sqrt{2}", "1.41421356", r"\sin(x)^2+\cos(x)^2", "50\\%", r"\frac{a}{b}",
            "(1,2)", "1,2", "x=1", "x<1", r"2\pi", "6.2831853", "ab", r"\text{ab}", "e^{x}", "-x", "|x|",
            r"\infty", "f(x)", r"\begin{pmatrix}1\\2\end{pmatrix}", "1e-9", "0"]  # fmt: skip
    seen = set()
    for gold in some:
        for answer in some:
            pair = worker._parse(gold), worker._parse(answer)
            if pair[1] and worker._plainly_different(*pair):
                assert not worker.verify(*pair, timeout_seconds=None), (gold, answer)
                seen.add((gold, answer))
    assert len(seen) > 100
    assert ("x+1", "x^2-1") in seen


@pytest.mark.slow
def test_ordinary_answers_take_little_time(grader):
    """Right, right in other letters, and wrong; in the lane of measurements 200 a second are wanted."""
    golds = [rf"\frac{{{i}}}{{7}}" for i in range(1, 60)]
    pairs = [(rf"\boxed{{{gold}}}", gold) for gold in golds]
    pairs += [(rf"\boxed{{{i}/7}}", gold) for i, gold in enumerate(golds, start=1)]
    pairs += [(rf"\boxed{{{i + 1}/7}}", gold) for i, gold in enumerate(golds, start=1)]
    grader.grade(pairs[-2:])
    start = time.monotonic()
    assert grader.grade(pairs) == [CORRECT] * 118 + [WRONG] * 59
    assert time.monotonic() - start < 20
