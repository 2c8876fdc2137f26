"""Probes: what is cut, counted and judged by hand; whole probes on random models of two layers."""

import dataclasses
import json
import math

import numpy as np
import pytest

from opd_jax.errors import ConfigError
from opd_jax.grading.grader import Grade
from opd_jax.tools.probe import continuation, pair, verdict, writing
from opd_jax.tools.probe.means import Mean, mean, paired
from opd_jax.tools.probe.verdict import DepthFigures, Judgement, PairFigures, Rating
from opd_jax.tools.probe.writing import Answer


def answer(
    grade: Grade | None = Grade.WRONG, *, truncated: bool = False, length: int = 5
) -> Answer:
    return Answer("text", grade, truncated, False, length)


def answers(*right: int) -> list[Answer]:
    return [answer(Grade.CORRECT if one else Grade.WRONG) for one in right]


# ---- means


def test_mean_and_its_error():
    # deviations 0.25 (three times) and -0.75: variance 0.75 / 3 = 0.25, error 0.5 / 2
    assert mean([1, 0, 1, 1]) == Mean(0.75, 0.25, 4)
    assert mean([0.3]) == Mean(0.3, 0.0, 1)
    assert str(Mean(0.75, 0.25, 4)) == "75.0% ± 25.0%"
    assert Mean(-0.161, 0.02, 4).signed == "-16.1 ± 2.0 points"


def test_paired_errors_are_those_of_the_differences():
    # differences 1, 0, 1, -1: mean 0.25, squares 0.5625 + 0.0625 + 0.5625 + 1.5625 = 2.75
    got = paired([1, 1, 1, 0], [0, 1, 0, 1])
    assert got.value == 0.25
    assert got.stderr == pytest.approx(math.sqrt(2.75 / 3) / 2)
    # every problem one better: no doubt at all, however different the problems are
    assert paired([3, 1, 8], [2, 0, 7]) == Mean(1.0, 0.0, 3)
    with pytest.raises(ValueError, match="zip"):
        paired([1], [1, 2])


# ---- cutting


def test_depths_are_fractions_of_the_budget_or_as_given():
    assert continuation.depths((), 160) == [20, 40, 80]
    assert continuation.depths((), 3) == [1]
    assert continuation.depths((30, 10), 31) == [10, 30]


@pytest.mark.parametrize(("given", "budget"), [((160,), 160), ((5, 200), 160), ((), 1)])
def test_a_depth_without_room_behind_it_is_refused(given, budget):
    with pytest.raises(ConfigError, match=f"max_response_tokens={budget}"):
        continuation.depths(given, budget)


def test_a_cut_lies_strictly_inside_the_response():
    length_B = np.array([5, 3, 4, 1])
    assert continuation.long_enough(length_B, 3) == [0, 2]
    assert continuation.long_enough(length_B, 4) == [0]
    assert continuation.long_enough(length_B, 5) == []


# ---- counting


def test_accuracies_by_depth():
    student = {0: answers(0, 0, 1, 0), 8: answers(1, 0, 1, 0)}
    teacher = {0: answers(1, 1, 1, 1), 8: answers(1, 1, 0, 0)}
    teacher[8][3] = answer(truncated=True)
    alone, behind = continuation.figures_of(student, teacher)
    assert (alone.depth, behind.depth) == (0, 8)
    assert alone.student.value == 0.25
    assert alone.gain == Mean(0.75, 0.25, 4)  # differences 1, 1, 0, 1
    assert alone.drop == Mean(0.0, 0.0, 4)
    assert behind.teacher.value == 0.5
    # gain: 0, 1, -1, 0; its squares sum to 2 around mean 0
    assert behind.gain.value == 0
    assert behind.gain.stderr == pytest.approx(math.sqrt(2 / 3) / 2)
    # drop: 0, 0, -1, -1; deviations of 0.5: variance 1 / 3
    assert behind.drop.value == -0.5
    assert behind.drop.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert (behind.student_truncation_rate, behind.teacher_truncation_rate) == (0, 0.25)


def test_sequence_means_leave_out_what_is_not_scored():
    values_BT = np.array([[np.nan, 1, 3, -np.inf], [7, 7, 7, 7], [0, -2, np.nan, 5]], np.float32)
    mask_BT = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    assert pair.sequence_means(values_BT, mask_BT) == [2.0, None, 1.5]


def test_advantages_of_right_and_wrong_rollouts():
    given = [*answers(1, 0, 1), answer(Grade.UNPARSED), answer(None), *answers(1)]
    means = pair.by_outcome([-1.0, -4.0, -2.0, -6.0, 99.0, None], given)
    assert means == {"advantage_right": -1.5, "advantage_wrong": -5.0}
    late = answer(Grade.TIMEOUT)  # says something about the machine alone
    assert pair.by_outcome([-1.0], [late]) == {"advantage_right": None, "advantage_wrong": None}
    assert pair.gain([late], answers(1)) is None
    assert pair.by_outcome([-1.0], answers(1))["advantage_wrong"] is None


def test_a_gain_is_over_problems_with_answers():
    assert pair.gain([*answers(1, 1), answer(None)], [*answers(0, 1), answer(None)]) == Mean(
        0.5, 0.5, 2
    )
    assert pair.gain([answer(None)], [answer(None)]) is None


def test_summaries():
    given = [*answers(1, 0), answer(Grade.UNPARSED, truncated=True, length=8), answer(None)]
    row = writing.summary(given)
    assert row["accuracy"] == pytest.approx(1 / 3)
    assert row["graded"] == 3
    assert row["unparsed"] == pytest.approx(1 / 3)
    assert row["truncation_rate"] == 0.25
    assert row["length_mean"] == 5.75
    assert "accuracy" not in writing.summary([answer(None)])


# ---- judging

FINE = PairFigures(
    overlap_ratio=0.8, chance=0.01, student_overlap_mass=0.99, teacher_overlap_mass=0.98,
    reverse_kl=0.2, student_entropy=0.3, teacher_entropy=0.2,
    gain=Mean(0.3, 0.05, 64), truncation_rate=0.1, repetition_rate=0.0, teacher_truncation_rate=0.0,
)  # fmt: skip


def ratings(**changes: object) -> dict[str, str]:
    judged = verdict.judge_pair(dataclasses.replace(FINE, **changes))  # type: ignore[arg-type]
    return {line.what: line.rating.value for line in judged}


def test_a_pair_without_a_fault():
    assert set(ratings().values()) == {"good"}
    assert "Worth training" in verdict.conclude_pair(verdict.judge_pair(FINE))


@pytest.mark.parametrize(
    ("what", "changes", "rating"),
    [
        ("thinking patterns", {"overlap_ratio": 0.72}, "good"),
        ("thinking patterns", {"overlap_ratio": 0.71}, "doubtful"),
        ("thinking patterns", {"overlap_ratio": 0.5}, "doubtful"),
        ("thinking patterns", {"overlap_ratio": 0.49}, "bad"),
        ("shared mass", {"student_overlap_mass": 0.96}, "doubtful"),
        ("shared mass", {"teacher_overlap_mass": 0.1}, "doubtful"),
        ("closeness", {"reverse_kl": 0.0}, "doubtful"),
        ("closeness", {"reverse_kl": 1.5}, "doubtful"),
        ("closeness", {"reverse_kl": 2.1}, "bad"),
        ("new knowledge", {"gain": Mean(0.1, 0.05, 64)}, "doubtful"),  # two errors, not more
        ("new knowledge", {"gain": Mean(0.11, 0.05, 64)}, "good"),
        ("new knowledge", {"gain": Mean(-0.1, 0.05, 64)}, "doubtful"),
        ("new knowledge", {"gain": Mean(-0.11, 0.05, 64)}, "bad"),
        ("new knowledge", {"gain": Mean(0.0, 0.01, 64)}, "doubtful"),
        ("new knowledge", {"gain": Mean(0.0, 0.0, 64)}, "unknown"),  # not one problem differs
        ("new knowledge", {"gain": Mean(1.0, 0.0, 15)}, "unknown"),
        ("new knowledge", {"gain": None}, "unknown"),
        ("truncation", {"truncation_rate": 0.23}, "good"),
        ("truncation", {"truncation_rate": 0.5}, "doubtful"),
        ("truncation", {"truncation_rate": 0.51}, "bad"),
        ("repetition", {"repetition_rate": 0.03}, "doubtful"),
        ("repetition", {"repetition_rate": 0.11}, "bad"),
        ("teacher's truncation", {"teacher_truncation_rate": 0.24}, "doubtful"),
    ],
)
def test_thresholds(what, changes, rating):
    given = ratings(**changes)
    assert given.pop(what) == rating
    assert set(given.values()) == {"good"}  # and of nothing else


def test_a_teacher_whose_answers_are_cut_off_is_not_called_worse():
    """A long thinker under a short budget scores 0; where it is better all the same, that counts."""
    for gain, rating in ((-0.4, "unknown"), (0.0, "unknown"), (0.4, "good")):
        given = ratings(gain=Mean(gain, 0.05, 64), teacher_truncation_rate=0.6)
        assert given["new knowledge"] == rating


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gain": Mean(-0.3, 0.05, 64), "overlap_ratio": 0.1}, "Not with this teacher"),
        ({"overlap_ratio": 0.1, "truncation_rate": 0.9}, "cold start on the teacher's solutions"),
        ({"truncation_rate": 0.9, "gain": Mean(0.0, 0.1, 64)}, "do not end by themselves"),
        ({"gain": Mean(0.0, 0.1, 64), "overlap_ratio": 0.6}, "Little gain expected"),
        ({"gain": None}, "could not be measured; the rest looks fine"),
        (
            {"gain": None, "overlap_ratio": 0.6},
            "could not be measured; doubtful: thinking patterns",
        ),
        ({"overlap_ratio": 0.6}, "Worth a short trial; doubtful: thinking patterns."),
    ],
)
def test_the_first_thing_in_the_way_is_what_is_said(changes, says):
    figures = dataclasses.replace(FINE, **changes)
    assert says in verdict.conclude_pair(verdict.judge_pair(figures))


def test_chance_is_named_where_the_ids_are_few():
    few = verdict.judge_pair(dataclasses.replace(FINE, chance=0.25))
    assert "chance alone gives 0.25" in few[0].why
    assert "chance" not in verdict.judge_pair(FINE)[0].why


def test_teachers_are_compared_among_those_that_know_more():
    same = dataclasses.replace(FINE, overlap_ratio=1.0, reverse_kl=0.0, gain=Mean(0.0, 0.02, 64))
    far = dataclasses.replace(FINE, overlap_ratio=0.7, reverse_kl=0.1, gain=Mean(0.5, 0.05, 64))
    lines = verdict.compare({"a": FINE, "b": same, "c": far})
    assert lines[0].startswith("of 2 of 3 teachers (clearly better than the student)")
    assert "highest overlap: a, 0.800" in lines[1]
    assert "lowest reverse KL: c, 0.100" in lines[2]
    assert "most accurate: c, +50.0 ± 5.0 points" in lines[3]
    nobody = verdict.compare({"a": dataclasses.replace(FINE, gain=None), "b": same})
    assert "highest overlap: b" in nobody[1]
    assert "most accurate: b" in nobody[3]


def at(depth: int, gain: float, drop: float = 0.0, count: int = 64) -> DepthFigures:
    some = Mean(0.5, 0.05, count)
    return DepthFigures(
        depth, some, some, Mean(gain, 0.05, count), Mean(drop, 0.05, count), 0.0, 0.0
    )


def test_judgements_on_continuation():
    alone, deepest, prefixes = verdict.judge_continuation([at(0, 0.4), at(8, 0.1, -0.2)])
    assert (alone.rating, deepest.rating) == (Rating.GOOD, Rating.DOUBTFUL)
    assert deepest.what == "behind 8 tokens"
    assert prefixes.rating is Rating.DOUBTFUL
    assert "-20.0 ± 5.0 points, a clear drop" in prefixes.why
    rated = [line.rating for line in verdict.judge_continuation([at(0, 0.4), at(8, -0.2, 0.1)])]
    assert rated == [Rating.GOOD, Rating.BAD, Rating.GOOD]
    few = verdict.judge_continuation([at(0, 0.4, count=3), at(8, 0.4, count=3)])
    assert {line.rating for line in few} == {Rating.UNKNOWN}


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ([0.4, 0.3, 0.2], "at every depth from 0 to 16 tokens"),
        ([0.4, 0.1, 0.3], "not clear at 8 tokens"),
        ([0.4, 0.1, 0.0], "not clear at 8, 16 tokens"),
        ([0.1, 0.0, -0.4], "does not clearly help at any depth"),
    ],
)
def test_how_deep_the_teacher_helps(gains, says):
    depths = [at(depth, gain) for depth, gain in zip((0, 8, 16), gains, strict=True)]
    assert says in verdict.conclude_continuation(depths)
    few = [dataclasses.replace(row, gain=Mean(0.4, 0.0, 15)) for row in depths]
    assert "15 problems are too few" in verdict.conclude_continuation(few)


def test_judgements_survive_the_report():
    lines = verdict.judge_pair(FINE)
    assert verdict.from_json(json.loads(json.dumps([line.as_json() for line in lines]))) == lines
    shown = verdict.lines_of([Judgement("closeness", Rating.BAD, "too far")])
    assert shown == ["  bad       closeness             too far"]
