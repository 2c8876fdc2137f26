r"""Where answers are found in texts, and what numbers and lists of answers are."""

import time

import pytest

from opd_jax.grading.extract import Found, close, find, letters, number, parts, same_letters

pytestmark = pytest.mark.short


@pytest.mark.parametrize(
    ("text", "fallbacks", "found"),
    [
        (r"\boxed{7} Answer: 8", ("answer_line",), Found("7")),  # the box comes first
        ("Answer: 8", (), None),
        ("Answer: 8", ("answer_line",), Found("8")),
        ("answer: 8\nAnswer: $\\frac{1}{2}$.\n", ("answer_line",), Found(r"\frac{1}{2}")),
        ("**Answer:** 8", ("answer_line",), Found("8")),
        ("**Answer: 8**", ("answer_line",), Found("8")),
        ("Answer:\n\n8", ("answer_line",), None),
        ("Answer: " + "9" * 2_001, ("answer_line",), None),
        ("so the answer is 8", ("answer_line",), None),
        ("<think>5</think> It is 8.", ("after_think",), Found("It is 8.", free=True)),
        ("<think>5", ("after_think",), None),
        ("a</think>  ", ("after_think",), None),
        (r"<think>\boxed{5}</think> It is 8.", ("after_think",), Found("5")),
        ("</think> Answer: 3", ("answer_line", "after_think"), Found("3")),
        ("</think> Answer: 3", ("after_think", "answer_line"), Found("Answer: 3", free=True)),
        ("5 days at $1,218.50 make $-6,092.", ("last_number",), Found("-6092")),
        ("half is .5, not 1/2 or so", ("last_number",), Found("2")),
        ("six", ("last_number",), None),
        (r"\boxed{7} and 8", ("last_number",), Found("7")),
        (r"\boxed{7} and \boxed{8", ("last_number",), None),  # ends inside a box
        (r"\boxed{7} and \boxed{", (), None),
        (
            r"Answer: 7 or \boxed{",
            ("answer_line",),
            Found(r"7 or \boxed{"),
        ),  # DAPO reads the line alone
        (
            r"</think> \boxed{7} and \boxed{",
            ("after_think",),
            Found(r"\boxed{7} and \boxed{", free=True),
        ),
    ],
)
def test_find(text, fallbacks, found):
    assert find(text, fallbacks) == found


def test_find_takes_linear_time():
    start = time.process_time()
    for part in ("Answer:", "</think>", "{", "answer*", "7", "-", "7,"):
        find(part * 150_000, ("answer_line", "last_number", "after_think"))
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4.5e33", 4.5e33), ("-7.4e-12", -7.4e-12), ("+2", 2.0), ("0.10", 0.1), (".5", 0.5), ("5.", 5.0),
        (r"4.5\times 10^{33}", 4.5e33), (r"6.02 \cdot 10^{23}", 6.02e23), (r"3 \times 10^8", 3e8),
        ("10^{-8}", 1e-8), ("10^5", 1e5), ("1,000", 1000.0), ("1{,}000", 1000.0), ("-1./3", -1 / 3),
        (r"1.6 \mathrm{~cm}", 1.6), (r"1.6 \text{ cm}", 1.6), ("1.6 cm", 1.6), (r"45^{\circ}", 45.0),
        (r"12\%", 12.0), (r"\$5", 5.0), (r"9.8 \mathrm{~m} / \mathrm{s}^{2}", 9.8), ("3 km/h", 3.0),
        (r"\approx 3.2", 3.2), (r"4.5 \times 10^{33} \mathrm{ergs/s}", 4.5e33),
        ("x", None), ("e5", None), ("2x", None), ("1,2", None), ("", None), ("-", None), (r"2\pi", None),
        (r"\frac{1}{2}", None), ("1e400", None), ("1e999999", None), ("9^{9^{9^9}}", None),
        (r"-8-8 \sqrt{3} i", None), ("5" + "a" * 5000 + "!", None), ("1/0", None),
    ],
)  # fmt: skip
def test_number(text, value):
    assert number(text) == (value if value is None else pytest.approx(value, rel=1e-12))


def test_close_is_relative():
    assert close(2.55e-10, 2.5501e-10)
    assert not close(2.55e-10, 3.3e-10)
    assert not close(1.0, 1.001)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("$(1,8,19), (2,7,13)$", ["(1,8,19)", "(2,7,13)"]),
        ("$69$,$84$", ["69", "84"]),
        (r"\{1, 3\}", ["1", "3"]),
        (r"\left\{1,2\right\}", ["1", "2"]),
        (r"1 \text{ and } 3", ["1", "3"]),
        ("x=1 or x=2", ["x=1", "x=2"]),
        ("-2,-2", ["-2", "-2"]),
        (r"\pm 3", ["+ 3", "- 3"]),
        ("1{,}000; 2", ["1000", "2"]),
        (r"\frac{1}{2},\sqrt{x}", [r"\frac{1}{2}", r"\sqrt{x}"]),
        ("7", ["7"]),
        ("", []),
        (")1,2(", [")1", "2("]),
    ],
)
def test_parts(text, found):
    assert parts(text) == found


def test_letters_leaves_out_what_only_looks():
    assert letters(r"$\left( 3, \dfrac{\pi}{2} \right)$.") == r"(3,\frac{\pi}{2})"
    assert letters(r"\leftarrow") == r"\leftarrow"
    assert letters("1 000") == "1000"


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("5", "5", True), ("x = 5", "5", True), (r"\lambda=5", "5", True), ("x=5", "x = 5", True),
        ("5", "x=5", False), ("y=5", "x=5", False), ("2x=5", "5", False), ("x=y=5", "5", False),
        ("x=", "", False), ("", "", True), (r"\ln x=5", "5", False), (r"\sin\alpha=5", "5", False),
        (r"\alpha_1=5", "5", True), ("x_{12}'=5", "5", True), (r"\ln=5", "5", False),
    ],
)  # fmt: skip
def test_same_letters(answer, gold, same):
    assert same_letters(answer, gold) is same
