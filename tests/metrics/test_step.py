"""Metrics of a step by hand: rollouts, scores, hedging words, extreme differences."""

import math
import re

import numpy as np
import pytest

from opd_jax import metrics
from opd_jax.types import Outcome, Rollout, Scores
from tests.metrics.test_compression import PROSE

pytestmark = pytest.mark.short


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
    ends = np.array([Outcome.BUDGET, Outcome.EOS, Outcome.REPETITION])
    assert metrics.truncated(ends).tolist() == [True, False, False]


def test_rollout_metrics_by_hand():
    made = rollout().replace(outcome_B=np.array([Outcome.EOS, Outcome.BUDGET]))
    scored = made.sampler_logprob_BT + np.array(
        # prompt and padding hold anything
        [[np.nan, np.inf, 0.1, -0.3, np.nan], [np.nan, 0.0, 0.2, 0.0, 0.0]], np.float32
    )  # fmt: skip
    mask_BT = made.response_mask_BT
    flagged_B = np.array([False, True])
    got = metrics.rollout_metrics(made, scored, mask_BT, flagged_B)
    expected = {
        "rollout/truncation_rate": 0.5,
        "rollout/repetition_rate": 0.5,
        "rollout/length_mean": 3.0,  # (2 + 4) / 2
        "rollout/length_max": 4.0,
        "rollout/tokens": 6.0,
        "rollout/sampler_logprob_gap_max": 0.3,
        "rollout/sampler_logprob_gap_mean": 0.1,  # (0.1 + 0.3 + 0 + 0.2 + 0 + 0) / 6
    }
    assert got == pytest.approx(expected, rel=1e-5)
    assert {type(value) for value in got.values()} == {float}
    none = metrics.rollout_metrics(made, scored, mask_BT & False, flagged_B)
    assert none["rollout/sampler_logprob_gap_max"] == none["rollout/sampler_logprob_gap_mean"] == 0


def test_stopped_rollouts_are_neither_truncated_nor_unmentioned():
    made = rollout().replace(outcome_B=np.array([Outcome.REPETITION, Outcome.BUDGET]))
    given = (made, made.sampler_logprob_BT, made.response_mask_BT, np.array([True, False]))
    got = metrics.rollout_metrics(*given, stops_on_repetition=True)
    assert got["rollout/stopped_rate"] == got["rollout/truncation_rate"] == 0.5
    assert "rollout/stopped_rate" not in metrics.rollout_metrics(*given)


MASK = np.array([[False, True, True], [False, True, False]])


def marked(*values: float) -> np.ndarray:
    """The three masked-in tokens; nan elsewhere."""
    array = np.full((2, 3), np.nan, np.float32)
    array[MASK] = values
    return array


SCORES = Scores(
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


ALONE = Scores(
    student_logprob_BT=SCORES.student_logprob_BT, student_entropy_BT=SCORES.student_entropy_BT,
    teacher_logprob_BT=None, teacher_entropy_BT=None, reverse_kl_BT=None, overlap_ratio_BT=None,
    overlap_advantage_BT=None, student_overlap_mass_BT=None, teacher_overlap_mass_BT=None,
)  # fmt: skip


def test_score_metrics_by_hand():
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
    got = metrics.score_metrics(SCORES, MASK)
    assert got == pytest.approx(expected, rel=1e-12)
    assert {type(value) for value in got.values()} == {float}
    assert set(metrics.score_metrics(SCORES, MASK & False).values()) == {0.0}


def test_without_a_teacher_the_students_keys_are_left():
    got = metrics.score_metrics(
        ALONE, MASK, np.array([1, 1]), positions=(1,), max_response_tokens=2
    )
    assert got == pytest.approx({
        "score/student_logprob_mean": -2.0, "score/student_entropy": 2.0,
        "rollout/first_1/tokens": 2.0,
        "score/first_1/student_logprob_mean": -2.0,  # (-1 - 3) / 2
        "score/first_1/student_entropy": 2.0,  # (1 + 3) / 2
    })  # fmt: skip


def test_sums_are_exact_where_float32_would_lose_them():
    values = np.full((1, 2**18 + 1), 2.0**-24, np.float32)
    values[0, 0] = 1.0  # a float32 sum of 1 and then 2^-24 again and again stays 1
    mask = np.ones_like(values, bool)
    scores = ALONE.replace(student_logprob_BT=values, student_entropy_BT=values)
    got = metrics.score_metrics(scores, mask)["score/student_entropy"] * values.size
    assert got == pytest.approx(1 + 2**-6, rel=1e-14)


def test_positions_count_from_the_end_of_the_prompt():
    """Reverse KL 1 2 3 4 5 after a prompt of 2, 10 and 20 after one of 4; the token of 3 is not scored."""
    kl_BT = np.array([[9, 9, 1, 2, 3, 4, 5, 9], [9, 9, 9, 9, 10, 20, 9, 9]], np.float32)
    mask_BT = np.zeros((2, 8), bool)
    mask_BT[0, [2, 3, 5, 6]] = mask_BT[1, 4:6] = True
    scores = ALONE.replace(reverse_kl_BT=kl_BT, student_logprob_BT=kl_BT, student_entropy_BT=kl_BT)
    got = metrics.score_metrics(
        scores, mask_BT, np.array([2, 4]), positions=(1, 2, 3, 4, 5, 6), max_response_tokens=5
    )
    kl = {first: got.get(f"score/first_{first}/reverse_kl") for first in range(1, 7)}
    tokens = {first: got.get(f"rollout/first_{first}/tokens") for first in range(1, 7)}
    none = {5: None, 6: None}  # no less than the budget: these are all tokens
    assert tokens == {1: 2, 2: 4, 3: 4, 4: 5} | none
    assert kl == {1: 11 / 2, 2: 33 / 4, 3: 33 / 4, 4: 37 / 5} | none
    assert got["score/reverse_kl"] == 7.0  # (1 + 2 + 4 + 5 + 10 + 20) / 6
    between = (tokens[4] * kl[4] - tokens[2] * kl[2]) / (tokens[4] - tokens[2])
    assert between == pytest.approx(4.0)  # the only scored token at place 2 or 3


def test_no_key_where_there_is_no_token():
    mask_BT = np.array([[False, False, False, True]])
    scores = ALONE.replace(student_logprob_BT=np.ones((1, 4)), student_entropy_BT=np.ones((1, 4)))
    got = metrics.score_metrics(
        scores, mask_BT, np.array([1]), positions=(1, 2, 3), max_response_tokens=4
    )
    assert {key for key in got if "first" in key} == {
        "rollout/first_3/tokens",
        "score/first_3/student_logprob_mean",
        "score/first_3/student_entropy",
    }


def test_score_metrics_equal_a_plain_loop():
    draw = np.random.default_rng(0)
    shape = (7, 40)
    fields = {
        name: draw.normal(size=shape).astype(np.float32) for name in SCORES.__dataclass_fields__
    }
    prompt_B = draw.integers(1, 10, 7)
    length_B = prompt_B + draw.integers(0, 31, 7)
    inside = (np.arange(40) >= prompt_B[:, None]) & (np.arange(40) < length_B[:, None])
    mask_BT = inside & (draw.random(shape) < 0.8)
    got = metrics.score_metrics(
        Scores(**fields), mask_BT, prompt_B, positions=(3, 8, 20), max_response_tokens=30
    )

    def mean(value, limit: int) -> float:
        found = [value(b, t) for b in range(7) for t in range(40)
                 if mask_BT[b, t] and t - prompt_B[b] < limit]  # fmt: skip
        return math.fsum(found) / len(found)

    def of(field: str):
        return lambda b, t: float(fields[field][b, t])

    quantities = {
        "advantage_mean": lambda b, t: float(
            fields["teacher_logprob_BT"][b, t] - fields["student_logprob_BT"][b, t]
        ),
        "entropy_gap": lambda b, t: abs(
            float(fields["teacher_entropy_BT"][b, t] - fields["student_entropy_BT"][b, t])
        ),
        "student_logprob_mean": of("student_logprob_BT"),
        "teacher_logprob_mean": of("teacher_logprob_BT"),
    }
    for name in ("reverse_kl", "student_entropy", "teacher_entropy", "overlap_ratio",
                 "overlap_advantage", "student_overlap_mass", "teacher_overlap_mass"):  # fmt: skip
        quantities[name] = of(f"{name}_BT")
    expected = {}
    for name, value in quantities.items():
        expected[f"score/{name}"] = mean(value, 99)
        for first in (3, 8, 20):
            expected[f"score/first_{first}/{name}"] = mean(value, first)
    for first in (3, 8, 20):
        expected[f"rollout/first_{first}/tokens"] = sum(
            bool(mask_BT[b, t]) for b in range(7) for t in range(40) if t - prompt_B[b] < first
        )
    assert got == pytest.approx(expected, rel=1e-12)


HEDGING = ("wait", "but", "maybe")


@pytest.mark.parametrize(
    ("texts", "rate"),
    [
        (["Wait, I am not sure."], 1 / 5),
        (["wait WAIT", "but so"], 3 / 4),  # over the words of all texts, not a mean of rates
        (["waiting butter maybe_not await"], 1 / 5),  # waiting butter maybe not await
        (["but\nmaybe\twait...but"], 1.0),
        (["don't: 12 + 3 = 15 \\but"], 1 / 3),  # don t but: figures are no words
        (["12 + 3 = 15.", ""], 0.0),
        ([], 0.0),
        (["h\u00e9las, but"], 1 / 2),
    ],
)
def test_hedging_rate_by_hand(texts, rate):
    assert metrics.hedging_rate(texts, HEDGING) == pytest.approx(rate)


def test_hedging_words_are_the_callers():
    assert metrics.hedging_rate(["Step one, step two"], ("STEP", "step")) == 0.5
    assert metrics.hedging_rate(["wait"], ()) == 0.0


def test_hedging_rate_of_plain_english_equals_a_regular_expression():
    text = (PROSE + " Wait. But maybe not, but who knows? ") * 3
    words = re.findall(r"[a-z]+", text.lower())
    expected = sum(word in HEDGING for word in words) / len(words)
    assert metrics.hedging_rate([text], HEDGING) == pytest.approx(expected)
    assert expected > 0.04


def test_extreme_probability_difference_by_hand():
    """|A| is 1, 2 and 3 in row 0 (9 outside the mask), 0.5 in row 1; row 2 has no scored token."""
    student = np.array([[-1.0, -2.0, -0.5, -1.0], [-1.5, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    teacher = np.array([[-2.0, -0.0, -3.5, -10.0], [-1.0, 9, 9, 9], [9, 9, 9, 9]], np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    scores = ALONE.replace(student_logprob_BT=student, teacher_logprob_BT=teacher)
    expected = ((math.exp(-0.5) - math.exp(-3.5)) + (math.exp(-1.5) - math.exp(-1.0))) / 2
    got = metrics.extreme_probability_difference(scores, mask)
    assert got == pytest.approx(expected, rel=1e-6)


def test_the_first_of_equally_extreme_tokens_counts_and_equal_models_differ_by_nothing():
    student = np.array([[-1.0, -2.0]], np.float32)
    scores = ALONE.replace(
        student_logprob_BT=student, teacher_logprob_BT=student + np.array([[1, -1]], np.float32)
    )
    mask = np.ones((1, 2), bool)
    got = metrics.extreme_probability_difference(scores, mask)
    assert got == pytest.approx(math.exp(-1) - 1, rel=1e-6)
    same = ALONE.replace(student_logprob_BT=student, teacher_logprob_BT=student)
    assert metrics.extreme_probability_difference(same, mask) == 0.0


def step(scores: Scores, mask_BT: np.ndarray = MASK, **more) -> dict[str, float]:
    made = Rollout(
        tokens_BT=np.array([[5, 6, 7], [5, 8, 0]], np.int32),
        length_B=np.array([3, 2], np.int32),
        prompt_length_B=np.array([1, 1], np.int32),
        sampler_logprob_BT=np.zeros((2, 3), np.float32),
        outcome_B=np.array([Outcome.EOS, Outcome.BUDGET], np.int32),
    )
    options = {"positions": (1, 5), "max_response_tokens": 4, "hedging": HEDGING} | more
    findings = metrics.Findings(
        ["but why", "so what"], mask_BT, np.array([[False, False, True], [False, True, False]]),
        np.array([False, True]), correct_B=options.pop("correct_B", None),
    )  # fmt: skip
    return metrics.step_metrics(made, scores, findings, **options)


def test_step_metrics_hold_every_part():
    got = step(SCORES, correct_B=np.array([True, False]), stops_on_repetition=True)
    parts = {
        "rollout/repetition_rate": 0.5, "rollout/stopped_rate": 0.0, "rollout/first_1/tokens": 2.0,
        "score/reverse_kl": 0.5, "score/first_1/reverse_kl": 0.5, "score/hedging_rate": 0.25,
        "score/repeated_token_fraction": 2 / 3,
        "score/repeated_token_advantage": -1.0,  # (1 - 3) / 2
        "score/regular_token_advantage": -1.0,
        "rollout/accuracy": 0.5,
        "score/reward_right": 0.0,  # (-1 + 1) / 2
        "score/reward_wrong": -3.0,
        "score/reward_auroc": 1.0,
        # Of row 0 the first of two equals: e^-1 - e^-2; of row 1 e^-3 - e^-6.
        "score/extreme_probability_difference": (
            math.exp(-1) - math.exp(-2) + math.exp(-3) - math.exp(-6)
        ) / 2,
    }  # fmt: skip
    assert {key: got[key] for key in parts} == pytest.approx(parts, rel=1e-6)
    assert all(math.isfinite(value) and type(value) is float for value in got.values())
    assert not {key for key in got if "first_5" in key}


def test_step_metrics_without_a_teacher_grades_or_hedging_words():
    got = step(ALONE, hedging=())
    assert "score/repeated_token_fraction" in got
    absent = ("advantage", "teacher", "reward", "accuracy", "hedging", "difference", "stopped")
    assert not [key for key in got if any(word in key for word in absent)]
    graded = step(ALONE, correct_B=np.array([True, True]))
    assert graded["rollout/accuracy"] == 1.0
    assert not [key for key in graded if "reward" in key]


def test_step_metrics_where_nothing_is_scored():
    got = step(SCORES, MASK & False, correct_B=np.array([True, False]))
    assert all(math.isfinite(value) for value in got.values())
    assert got["rollout/accuracy"] == 0.5
    assert not [key for key in got if "first" in key or "reward" in key or "difference" in key]
