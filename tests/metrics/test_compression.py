"""Repetition by compression: a text's bytes over its compressed bytes, and what is called repetitive."""

import zlib

import pytest

from opd_jax import metrics
from opd_jax.metrics import RepetitionRule

pytestmark = pytest.mark.short


PAPER = RepetitionRule(tail=10_000, threshold=10.0)


SMALL = RepetitionRule(tail=200, threshold=5.0)


PROSE = (
    "Take the train at nine, change at the second stop, and walk along the river until you see "
    "an old mill; my aunt lives in the low brick house behind it and expects us for lunch, so "
    "bring bread, some cheese, and the blue umbrella that you borrowed last week."
)


ONE_LETTER = 1000 / len(zlib.compress(b"a" * 1000, 6))  # 17 bytes: one literal, a few long copies


def test_compression_ratio_is_bytes_over_zlib_bytes():
    assert 50 < ONE_LETTER < 70
    assert metrics.compression_ratio("a" * 1000, tail=10_000) == pytest.approx(ONE_LETTER)


def test_compression_ratio_reads_the_tail_only():
    assert metrics.compression_ratio(PROSE + "a" * 1000, tail=1000) == pytest.approx(ONE_LETTER)
    assert metrics.compression_ratio("a" * 1000 + PROSE, tail=len(PROSE)) < 3


def test_compression_ratio_counts_bytes_not_characters():
    data = b"\xc3\xa9" * 100  # e acute: 100 characters, 200 bytes
    expected = 200 / len(zlib.compress(data))
    assert metrics.compression_ratio("\u00e9" * 100, tail=100) == pytest.approx(expected)


def test_compression_ratio_of_odd_texts():
    assert metrics.compression_ratio("", tail=10) == 0.0
    assert metrics.compression_ratio("a", tail=10) == pytest.approx(1 / 9)  # zlib's own bytes
    assert metrics.compression_ratio("\ud800" * 50, tail=100) > 1  # half a character, no error


def test_repetitive_needs_a_text_longer_than_the_tail():
    assert not metrics.repetitive("ab" * 5_000, PAPER)  # exactly L = 10,000 characters
    assert metrics.repetitive("ab" * 5_000 + "a", PAPER)
    assert not metrics.repetitive("ab" * 100, SMALL)
    assert metrics.repetitive("ab" * 101, SMALL)


def test_short_texts_are_never_flagged_by_the_papers_numbers():
    # The trap: a response of 2,000 tokens that says one word is below L, so RepRate misses it.
    looping = "wait " * 1_900
    assert metrics.compression_ratio(looping, tail=10_000) > 100
    assert not metrics.repetitive(looping, PAPER)


def test_a_short_tail_cannot_reach_the_papers_threshold():
    # 100 characters shrink to no less than zlib's 11 bytes of its own and a copy: below 10.
    assert not metrics.repetitive("a" * 500, RepetitionRule(tail=100, threshold=10.0))


def test_prose_is_not_repetitive_but_its_repetition_is():
    assert len(PROSE) > SMALL.tail
    assert not metrics.repetitive(PROSE, SMALL)
    assert metrics.repetitive(PROSE + "So it is. " * 20, SMALL)
    assert not metrics.repetitive("So it is. " * 20 + PROSE, SMALL)  # it found its way out


def test_the_level_is_zlibs():
    loop = "".join(chr(97 + i * i % 26) for i in range(1000))
    for level in (1, 6, 9):
        expected = 1000 / len(zlib.compress(loop.encode(), level))
        got = metrics.compression_ratio(loop, tail=1000, level=level)
        assert got == pytest.approx(expected)
    ratios = [metrics.compression_ratio(loop, tail=999, level=level) for level in (1, 9)]
    assert ratios[0] < ratios[1]
    between = sum(ratios) / 2
    flags = [metrics.repetitive(loop, RepetitionRule(999, between, i)) for i in (1, 9)]
    assert flags == [False, True]


def test_flagged_is_repetitive_of_each():
    got = metrics.flagged(["ab" * 101, "ab" * 100, PROSE, ""], SMALL)
    assert got.dtype == bool
    assert got.tolist() == [True, False, False, False]
    assert metrics.flagged([], SMALL).shape == (0,)
