"""What the guard does about an alarm: each action by itself, and runs that it controls."""

import dataclasses
import json

import numpy as np
import pytest

from opd_jax.training import collapse_detector, collapse_guard
from opd_jax.training.collapse_detector import Alarm
from opd_jax.training.collapse_guard import Response, State
from tests.support.guard_traces import COLLAPSES, measured, observed, row, rows, rules


def alarm(step: int = 50, onset: int = 41, again: bool = False) -> Alarm:
    return Alarm(step, onset, "collapse", again)


def respond(
    state: State, settings: collapse_guard.Rules, found: Alarm | None, checkpoints=(10, 20, 30, 40)
):
    return collapse_guard.respond(state, found.step if found else 51, found, settings, checkpoints)


ALARMED = State(alarmed=True)


def test_warn_says_it_once():
    state, response = respond(ALARMED, rules(action="warn"), alarm())
    assert response == Response(("collapse",), {"guard/alarm": 1.0, "guard/onset": 41.0})
    assert collapse_guard.terms(state, rules(action="warn")) == (0.0, 0.0)
    assert respond(state, rules(action="warn"), alarm(again=True))[1] == Response()


def test_stop_stops():
    _, response = respond(ALARMED, rules(action="stop"), alarm())
    assert response.stop
    assert response.event == {"guard/alarm": 1.0, "guard/onset": 41.0, "guard/stopped": 1.0}


def test_strengthening_doubles_from_the_floors_up_to_the_bounds():
    settings = rules(action="strengthen", beta_kl_max=0.1, lambda_gold_max=1.0)
    settings = dataclasses.replace(settings, lambda_gold=0.3)
    state, seen = ALARMED, []
    for _ in range(5):
        state, response = respond(state, settings, alarm())
        seen.append((response.event["guard/beta_kl"], response.event["guard/lambda_gold"]))
        assert response.event.get("guard/alarm") == 1.0
        assert (seen[-1]) == collapse_guard.terms(state, settings)
    want = [(0.01, 0.6), (0.02, 1.0), (0.04, 1.0), (0.08, 1.0), (0.1, 1.0)]
    np.testing.assert_allclose(seen, want)
    # At the bounds nothing is left to do or to say; the terms are still told.
    same, response = respond(state, settings, alarm(again=True))
    assert same == state
    assert response.lines == ()
    assert set(response.event) == {"guard/beta_kl", "guard/lambda_gold"}


def test_a_bound_of_zero_leaves_a_term_alone():
    settings = rules(action="strengthen", lambda_gold_max=0.0)
    assert collapse_guard.terms(State(level=4), settings) == (pytest.approx(0.08), 0.0)
    configured = dataclasses.replace(settings, lambda_gold=0.5)
    assert collapse_guard.terms(State(level=4), configured)[1] == 0.5


def test_health_takes_strengthening_back_level_by_level():
    settings = rules(action="strengthen", patience=10)
    state = State(alarmed=True, level=2, healthy=9)
    same, response = respond(state, settings, None)
    assert same == state
    assert response.event == {"guard/beta_kl": 0.02, "guard/lambda_gold": 0.2}
    state, response = respond(dataclasses.replace(state, healthy=10), settings, None)
    assert response.event == {
        "guard/recovered": 1.0, "guard/beta_kl": 0.01, "guard/lambda_gold": 0.1,
    }  # fmt: skip
    assert (state.alarmed, state.healthy, state.level) == (False, 0, 1)
    state, response = respond(dataclasses.replace(state, healthy=10), settings, None)
    assert response.event == {"guard/beta_kl": 0.0, "guard/lambda_gold": 0.0}  # as configured
    assert response.lines == ("from here on beta_kl=0, lambda_gold=0",)
    assert respond(dataclasses.replace(state, healthy=10), settings, None)[1] == Response()


def test_each_further_collapse_doubles_the_patience():
    settings = rules(action="strengthen", patience=10)
    state = State(alarmed=True, level=1, healthy=39, collapses=3)
    assert respond(state, settings, None)[0] == state
    assert respond(dataclasses.replace(state, healthy=40), settings, None)[0].level == 0
    counted, _ = observed([row(0.1)] * 30 + [row(0.9, 0.5)] * 40, settings)
    assert counted.collapses == 1
    counted, _ = observed(
        [row(0.1)] * 30, settings, dataclasses.replace(counted, alarmed=False, pause=0)
    )
    assert observed([row(0.9, 0.5)] * 5, settings, counted)[0].collapses == 2


def test_masking_lasts_until_health():
    settings = rules(action="mask")
    assert not collapse_guard.masking(State(), settings)
    state, response = respond(ALARMED, settings, alarm())
    assert collapse_guard.masking(state, settings)
    assert response.event["guard/masking"] == 1.0
    state, response = respond(dataclasses.replace(state, healthy=settings.patience), settings, None)
    assert not collapse_guard.masking(state, settings)
    assert response.event == {"guard/recovered": 1.0, "guard/masking": 0.0}


def test_rollback_goes_to_the_newest_checkpoint_that_is_surely_before_the_onset():
    settings = rules(action="rollback")
    for checkpoints, want in (
        ((10, 20, 30, 40), 30),  # 40 is less than MARGIN steps before 41
        ((40,), 40),  # better than none
        ((41, 50), None),
        ((), None),
    ):
        _, response = respond(ALARMED, settings, alarm(), checkpoints)
        assert response.restore == want
        assert not response.stop


def test_rollback_goes_on_strengthened_and_tells_it_on_the_next_line_that_is_kept():
    settings = rules(action="rollback")
    before, alarms = observed([row(0.1)] * 40 + [row(0.9, 0.5)] * 3, settings)
    state, response = collapse_guard.respond(before, 43, alarms[0], settings, [20])
    assert response.restore == 20
    assert response.event["guard/rolled_back_to"] == 20
    assert (state.rollbacks, state.level, state.alarmed) == (1, 1, True)
    assert (state.mean, state.evidence, state.recent) == (before.mean, {}, ())
    state, found = collapse_detector.observe(state, 21, row(0.1), settings)
    state, response = collapse_guard.respond(state, 21, found, settings, [20])
    assert response.event == {
        "guard/alarm": 1.0, "guard/onset": 41.0, "guard/rolled_back_from": 43.0,
        "guard/rolled_back_to": 20.0, "guard/rollbacks": 1.0,
        "guard/beta_kl": 0.01, "guard/lambda_gold": 0.1,
    }  # fmt: skip
    state, found = collapse_detector.observe(state, 22, row(0.1), settings)
    _, response = collapse_guard.respond(state, 22, found, settings, [20])
    assert set(response.event) == {"guard/beta_kl", "guard/lambda_gold"}


def test_the_last_rollback_is_followed_by_a_stop():
    settings = rules(action="rollback", max_rollbacks=2)
    _, response = respond(State(alarmed=True, rollbacks=2, level=2), settings, alarm())
    assert response.stop
    assert response.restore == 30  # the run ends where it was healthy
    assert "2 times already; it stops at step 30" in response.lines[1]


def test_without_a_checkpoint_a_rollback_strengthens_where_it_is():
    state, response = respond(ALARMED, rules(action="rollback"), alarm(), ())
    assert (state.level, state.rollbacks, response.restore) == (1, 0, None)
    assert "no checkpoint" in response.lines[1]


def test_a_checkpoint_of_a_collapse_that_goes_on_is_no_way_back():
    """Nothing to go back to at the first alarm; at the second, only what was saved since."""
    settings = rules(action="rollback")
    state, restored, onsets = State(), [], []
    for step, metrics in enumerate([row(0.1)] * 40 + [row(0.9, 0.5)] * 30, start=1):
        state, found = collapse_detector.observe(state, step, metrics, settings)
        state, response = collapse_guard.respond(
            state, step, found, settings, [42] if step > 42 else []
        )
        restored += [response.restore] if response.restore is not None else []
        onsets += [found.onset] if found else []
    assert onsets == [41] * 4
    assert restored == []


def test_a_run_killed_in_a_rollback_goes_on_with_it():
    old, new = State(), State(rollbacks=1)
    assert collapse_guard.resumed((60, old), None) == (60, old)
    assert collapse_guard.resumed((60, old), (40, new)) == (
        40,
        new,
    )  # later checkpoints were still there
    assert collapse_guard.resumed((40, old), (40, new)) == (
        40,
        new,
    )  # the checkpoint holds its own past
    assert collapse_guard.resumed((80, new), (40, new)) == (80, new)


def controlled(
    settings: collapse_guard.Rules, steps: int, *, cure: float
) -> tuple[list[float], list[Response]]:
    """A run that loops more and more from step 60 on, the slower the larger beta_kl: at `cure` it heals."""
    state, ill, truncated, told, saved = State(), 0.0, [], [], {}
    draw, step = np.random.default_rng(0), 0
    for _ in range(steps):
        step += 1
        beta_kl, _ = collapse_guard.terms(state, settings)
        ill = min(max(ill + (0.03 * (1 - beta_kl / cure) if step > 60 else 0.0), 0.0), 0.9)
        share = draw.binomial(64, 0.05 + ill) / 64
        state, found = collapse_detector.observe(state, step, row(share, ill / 2), settings)
        state, response = collapse_guard.respond(state, step, found, settings, sorted(saved))
        truncated.append(share)
        told.append(response)
        if response.stop:
            break
        if response.restore is not None:
            step = response.restore
            ill = saved[step]
        elif step % 10 == 0:
            saved[step] = ill
    return truncated, told


def test_strengthening_ends_a_collapse_that_it_can_end():
    truncated, told = controlled(rules(action="strengthen"), 200, cure=0.015)
    assert max(truncated) < 0.9
    assert np.mean(truncated[150:]) < 0.3
    assert sum("guard/alarm" in response.event for response in told) < 8


def test_rolling_back_ends_a_collapse_and_healthy_steps_are_not_run_again_for_ever():
    truncated, told = controlled(rules(action="rollback"), 300, cure=0.009)
    back = [response.restore for response in told if response.restore is not None]
    assert back == [50]
    assert max(truncated) < 0.7
    assert np.mean(truncated[150:]) < 0.1
    truncated, told = controlled(rules(action="rollback"), 400, cure=10.0)
    assert sum(response.restore is not None for response in told) == 4
    assert told[-1].stop  # the fourth time


@pytest.mark.short
def test_a_measured_run_that_loops_for_a_while_is_alarming_and_recovers():
    """Truncation 0 -> 0.62 at steps 79 and 90, all of it repetitive, and back to 0 by itself."""
    state, told = State(), []
    for step, metrics in enumerate(measured("unsteady"), start=1):
        state, found = collapse_detector.observe(state, step, metrics, rules(action="warn"))
        state, response = collapse_guard.respond(state, step, found, rules(action="warn"), [])
        told += [(step, name) for name in response.event]
    alarms = [step for step, name in told if name == "guard/alarm"]
    assert len(alarms) == 1
    assert 70 < alarms[0] < 79
    assert "guard/recovered" in [name for step, name in told if step > 100]


@pytest.mark.short
def test_a_state_goes_through_json_at_any_step():
    run = rows(COLLAPSES["0.23 -> 0.97 in 30 steps"](40), 16, 4, seed=1)[:120]
    settings = rules(action="strengthen")
    straight, stored = State(), State()
    for step, metrics in enumerate(run, start=1):
        results = []
        for state in (straight, collapse_guard.from_json(collapse_guard.to_json(stored))):
            state, alarm = collapse_detector.observe(state, step, metrics, settings)
            results.append(collapse_guard.respond(state, step, alarm, settings, []))
        assert results[0] == results[1]
        straight, stored = results[0][0], results[1][0]
    assert straight.level > 0
    assert json.loads(collapse_guard.to_json(straight))["level"] == straight.level
