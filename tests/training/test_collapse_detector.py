"""The collapse detector: its evidence by hand, synthetic and measured runs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from opd_jax.training import collapse_detector
from tests.support.guard_traces import (
    BATCHES,
    HEALTHY,
    detections,
    false_alarms,
    measured,
    observed,
    row,
    rules,
)

pytestmark = pytest.mark.short


# ---------------------------------------------------------------------------- evidence


@pytest.mark.parametrize(
    ("x", "p0", "p1", "n", "want"),
    [
        (0.5, 0.25, 0.5, 8, 1.15073),  # 8 (ln 2 + ln(2/3)) / 2
        (0.0, 0.25, 0.5, 8, -3.24372),  # 8 ln(2/3)
        (1.0, 0.25, 0.5, 8, 5.54518),  # 8 ln 2
        (0.1, 0.01, 0.109, 20, 2.88104),  # 2 ln 10.9 + 18 ln 0.9
    ],
)
def test_increment_by_hand(x, p0, p1, n, want):
    assert collapse_detector.increment(x, p0, p1, n) == pytest.approx(want, abs=1e-5)


def test_chance_alone_multiplies_the_likelihood_ratio_by_one_in_the_mean():
    n, p0, p1 = 6, 0.3, 0.5
    binomial = sum(
        math.comb(n, k)
        * p0**k
        * (1 - p0) ** (n - k)
        * math.exp(collapse_detector.increment(k / n, p0, p1, n))
        for k in range(n + 1)
    )
    assert binomial == pytest.approx(1)
    # Shares that are not yes or no, of the same mean: less.
    thirds = itertools.product([0.15, 0.3, 0.45], repeat=n)
    spread = np.mean(
        [math.exp(collapse_detector.increment(float(np.mean(x)), p0, p1, n)) for x in thirds]
    )
    assert spread < 0.8


def test_rollouts_of_a_prompt_count_as_alike():
    assert rules(64, 1).rollouts == 64
    assert rules(16, 4).rollouts == pytest.approx(64 / 2.5)


def test_evidence_by_hand():
    settings = dataclasses.replace(rules(), rollouts=24.0)
    state, _ = observed([row(0.25)] * 5, settings)
    assert state.mean["truncation"] == 0.25
    assert state.evidence == {}  # the first steps are the baseline's alone
    state, _ = collapse_detector.observe(state, 6, row(0.5), settings)
    # 5 x 24 rollouts: mean (30 + 0.5) / 121 = 0.25207, standard error 0.03947, so p0 = 0.29154 and
    # p1 = p0 + 0.70846 / 4 = 0.46865; 12 (ln(0.46865 / 0.29154) + ln(0.53135 / 0.70846)) = 2.2444
    assert state.evidence["truncation"] == pytest.approx(2.2444, abs=2e-3)
    assert state.since["truncation"] == 6
    state, _ = collapse_detector.observe(
        state, 7, row(1.0), settings
    )  # 11.4 more, of which a third of A counts
    assert state.evidence["truncation"] == pytest.approx(2.2444 + math.log(1000) / 3, abs=2e-3)
    state, _ = collapse_detector.observe(state, 8, row(0.0), settings)
    assert state.evidence["truncation"] == 0  # 24 ln(0.53135 / 0.70846) = -6.9
    state, _ = collapse_detector.observe(state, 9, row(0.5), settings)
    assert state.since["truncation"] == 9


def test_the_baseline_takes_in_a_step_ten_steps_later():
    state, _ = observed([row(0.1)] * 5 + [row(0.2)] * 10, rules())
    assert state.mean["truncation"] == pytest.approx(0.1)
    state, _ = collapse_detector.observe(state, 16, row(0.2), rules())
    assert state.mean["truncation"] == pytest.approx((5 * 0.1 + 0.2) / 6)
    assert len(state.recent) == collapse_detector.LAG


def test_the_baseline_forgets():
    settings = dataclasses.replace(rules(), memory=20)
    state, _ = observed([row(0.1)] * 25 + [row(0.0)] * 11, settings)
    assert state.steps["truncation"] == 26
    assert state.mean["truncation"] == pytest.approx(0.1 * 19 / 20)


def test_an_alarm_takes_three_steps_at_least():
    state, alarms = observed([row(0.0)] * 30 + [row(1.0, 1.0)] * 2, rules(64, 4))
    assert not alarms
    _, alarms = observed([row(0.0)] * 30 + [row(1.0, 1.0)] * 3, rules(64, 4))
    assert [(a.step, a.onset) for a in alarms] == [(33, 31)]
    assert state.evidence["truncation"] == pytest.approx(math.log(1000) * 2 / 3)


def test_truncation_that_rises_alone_to_less_than_half_is_no_alarm():
    assert not observed([row(0.1)] * 30 + [row(0.4)] * 60, rules())[1]
    assert observed([row(0.1)] * 30 + [row(0.4, 0.2)] * 60, rules())[1]
    assert not observed([row(0.1)] * 30 + [row(0.1, 0.1)] * 60, rules())[1]  # nor repetition alone
    assert observed([row(0.1)] * 30 + [row(0.8)] * 60, rules())[1]


def test_repeated_tokens_agree_where_no_text_is_long_enough_to_be_flagged():
    tokens = "score/repeated_token_fraction"
    quiet, loud = row(0.1, **{tokens: 0.3}), row(0.4, **{tokens: 0.6})
    assert observed([quiet] * 30 + [loud] * 10, rules())[1]
    assert not observed([quiet] * 30 + [loud | {tokens: 0.3}] * 10, rules())[1]


def test_rows_stopped_on_repetition_count_as_truncated_and_repetitive():
    stopped = row(0.0, **{"rollout/stopped_rate": 0.5})
    _, alarms = observed([row(0.0)] * 30 + [stopped] * 5, rules())
    assert alarms[0].onset == 31


@pytest.mark.parametrize(
    "metrics", [{}, {"loss/sft": 1.0}, row(math.nan), {"rollout/truncation_rate": 1.0}]
)
def test_steps_that_say_nothing_change_nothing(metrics):
    state, _ = observed([row(0.1)] * 20, rules())
    assert collapse_detector.observe(state, 21, metrics, rules()) == (state, None)


def test_an_alarm_says_what_rose_from_what_to_what():
    more = {"score/student_entropy": 0.5, "rollout/length_mean": 800.0}
    less = {"score/student_entropy": 0.2, "rollout/length_mean": 1900.0}
    _, alarms = observed([row(0.25, **more)] * 30 + [row(0.75, 0.25, **less)] * 9, rules())
    assert alarms[0].text == (
        f"step {alarms[0].step}: collapse since about step 31: truncation 0.25 -> 0.75, "
        "repetition 0 -> 0.25 (entropy 0.5 -> 0.2, length 800 -> 1.9e+03)"
    )


# ---------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_raise_no_alarm(name):
    """Five seeds of each kind and batch size; what 200 of each give is in docs/measurements/guard.md."""
    assert sum(false_alarms(HEALTHY[name], *batch, seeds=5) for batch in BATCHES) == 0


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("the same, later", (16, 4)),
        ("0 -> 0.97 in 30 steps", (16, 4)),
        ("0 -> 0.97 in 30 steps, loops 5 later", (16, 4)),
        ("0.23 -> 0.97 in 30 steps", (16, 4)),
        ("0.23 -> 0.97 in 30 steps, loops 5 later", (16, 4)),
        ("0.23 -> 0.97 in 100 steps", (16, 4)),
        ("0.5 -> 0.97 in 100 steps", (16, 4)),
        ("0.5 -> 0.97 in 30 steps", (64, 4)),
        ("0.5 -> 0.97 in 30 steps, loops 5 later", (64, 4)),
        ("0.23 -> 0.97, logistic in 30 steps", (64, 4)),
    ],
)
def test_a_collapse_is_seen_ten_steps_before_nine_in_ten_are_truncated(name, batch):
    lead, error = detections(name, *batch, seeds=20)
    assert lead.min() >= 10
    assert 0 <= np.median(error) <= 20


def test_a_collapse_from_the_first_step_on_is_seen_in_time():
    """The baseline is then made of the collapse's own first steps."""
    lead, _ = detections("measured once, from step 0 on", 16, 4, seeds=40)
    assert np.median(lead) >= 10
    assert lead.min() >= 1


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("loops", 10),  # a teacher that loves loops: truncation 0 -> 0.9 in 30 steps
        ("large_rate", 1),  # 0.17 -> 0.97 in two steps: nobody can see it ten steps before
    ],
)
def test_measured_collapses_are_seen_before(name, lead):
    run = measured(name)
    crossed = 1 + next(i for i, m in enumerate(run) if m["rollout/truncation_rate"] > 0.9)
    alarm = observed(run, rules())[1][0]
    assert crossed - alarm.step >= lead
    assert alarm.onset <= alarm.step - 3


def test_a_measured_healthy_run_raises_no_alarm():
    assert observed(measured("healthy"), rules())[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_hundreds_of_healthy_runs(name):
    assert sum(false_alarms(HEALTHY[name], *batch, seeds=200) for batch in BATCHES) <= 5


# ---------------------------------------------------------------------------- after an alarm


def test_after_an_alarm_nothing_is_concluded_at_once_and_the_baseline_stands_still():
    bad = [row(0.9, 0.5)] * 40
    state, alarms = observed([row(0.1)] * 30 + bad, rules())
    gaps = np.diff([alarm.step for alarm in alarms])
    assert [alarm.again for alarm in alarms] == [False] + [True] * len(gaps)
    assert (gaps == collapse_detector.PAUSE + collapse_detector.SPLIT).all()
    assert state.mean["truncation"] == pytest.approx(0.1)
