"""Truncation, repetition and score means on records made by hand."""

import zlib

import numpy as np
import pytest

from opd_jax import metrics
from opd_jax.types import Outcome, Rollout, Scores

PAPER = {"tail": 10_000, "threshold": 10.0}
SMALL = {"tail": 200, "threshold": 5.0}
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
    assert not metrics.repetitive("ab" * 5_000, **PAPER)  # exactly L = 10,000 characters
    assert metrics.repetitive("ab" * 5_000 + "a", **PAPER)
    assert not metrics.repetitive("ab" * 100, **SMALL)
    assert metrics.repetitive("ab" * 101, **SMALL)


def test_short_texts_are_never_flagged_by_the_papers_numbers():
    # The trap: a response of 2,000 tokens that says one word is below L, so RepRate misses it.
    looping = "wait " * 1_900
    assert metrics.compression_ratio(looping, tail=10_000) > 100
    assert not metrics.repetitive(looping, **PAPER)


def test_a_short_tail_cannot_reach_the_papers_threshold():
    # 100 characters shrink to no less than zlib's 11 bytes of its own and a copy: below 10.
    assert not metrics.repetitive("a" * 500, tail=100, threshold=10.0)


def test_prose_is_not_repetitive_but_its_repetition_is():
    assert len(PROSE) > SMALL["tail"]
    assert not metrics.repetitive(PROSE, **SMALL)
    assert metrics.repetitive(PROSE + "So it is. " * 20, **SMALL)
    assert not metrics.repetitive("So it is. " * 20 + PROSE, **SMALL)  # it found its way out


def rollout() -> Rollout:
    """Prompts of 2 and 1 tokens, responses of 2 and 4; the second has used its whole budget."""
    return Rollout(
        tokens_BT=np.array([[5, 6, 7, 1, 0], [5, 8, 9, 8, 1]], np.int32),
        length_B=np.array([4, 5], np.int32),
        prompt_length_B=np.array([2, 1], np.int32),
        sampler_logprob_BT=np.array(
            [[0, 0, -1.0, -2.0, 0], [0, -1.0, -1.5, -2.0, -0.5]], np.float32
        ),
        outcome_B=np.array([Outcome.EOS, Outcome.EOS], np.int32),
    )


def test_truncated_is_the_outcome_not_the_length():
    made = rollout()
    assert made.response_length_B.tolist() == [2, 4]
    # Token 1 ends a text. In row 1 it came in the last slot of the budget: finished all the same.
    assert metrics.truncated(made.outcome_B).tolist() == [False, False]
    assert metrics.truncated(np.array([Outcome.BUDGET, Outcome.EOS])).tolist() == [True, False]


def test_rollout_metrics_by_hand():
    made = rollout().replace(outcome_B=np.array([Outcome.EOS, Outcome.BUDGET]))
    scored = made.sampler_logprob_BT + np.array(
        # prompt and padding hold anything
        [[np.nan, np.inf, 0.1, -0.3, np.nan], [np.nan, 0.0, 0.2, 0.0, 0.0]], np.float32
    )  # fmt: skip
    mask_BT = made.response_mask_BT
    got = metrics.rollout_metrics(made, scored, mask_BT, ["a" * 90, "a" * 300], **SMALL)
    expected = {
        "rollout/truncation_rate": 0.5,
        "rollout/repetition_rate": 0.5,  # the first text is too short to be flagged
        "rollout/length_mean": 3.0,  # (2 + 4) / 2
        "rollout/length_max": 4.0,
        "rollout/tokens": 6.0,
        "rollout/sampler_logprob_gap_max": 0.3,
        "rollout/sampler_logprob_gap_mean": 0.1,  # (0.1 + 0.3 + 0 + 0.2 + 0 + 0) / 6
    }
    assert got == pytest.approx(expected, rel=1e-5)
    assert {type(value) for value in got.values()} == {float}
    none = metrics.rollout_metrics(made, scored, mask_BT & False, ["a", "b"], **SMALL)
    assert none["rollout/sampler_logprob_gap_max"] == none["rollout/sampler_logprob_gap_mean"] == 0


def test_score_metrics_by_hand():
    mask = np.array([[False, True, True], [False, True, False]])

    def marked(*values: float) -> np.ndarray:
        """The three masked-in tokens; nan elsewhere."""
        array = np.full((2, 3), np.nan, np.float32)
        array[mask] = values
        return array

    scores = Scores(
        student_logprob_BT=marked(-1.0, -2.0, -3.0),
        teacher_logprob_BT=marked(-2.0, -1.0, -6.0),
        student_entropy_BT=marked(1.0, 2.0, 3.0),
        teacher_entropy_BT=marked(2.0, 1.0, 3.0),
        reverse_kl_BT=marked(0.25, 0.5, 0.75),
        overlap_ratio_BT=marked(1.0, 0.5, 0.0),
        overlap_advantage_BT=marked(-0.5, -0.25, 0.0),
        student_overlap_mass_BT=marked(0.875, 0.625, 0.0),
        teacher_overlap_mass_BT=marked(1.0, 0.5, 0.0),
    )
    expected = {
        "score/advantage_mean": -1.0,  # (-1 + 1 - 3) / 3
        "score/student_logprob_mean": -2.0,
        "score/teacher_logprob_mean": -3.0,
        "score/reverse_kl": 0.5,
        "score/student_entropy": 2.0,
        "score/teacher_entropy": 2.0,
        "score/entropy_gap": 2 / 3,  # (|2-1| + |1-2| + |3-3|) / 3: signs do not cancel
        "score/overlap_ratio": 0.5,
        "score/overlap_advantage": -0.25,
        "score/student_overlap_mass": 0.5,
        "score/teacher_overlap_mass": 0.5,
    }
    got = {name: float(value) for name, value in metrics.score_metrics(scores, mask).items()}
    assert got == pytest.approx(expected, rel=1e-6)
