"""What shapes, extrapolation, evidence and copies of the teacher cannot be combined with: one line each."""

import pytest

from configs import grpo, opd
from opd_jax.config.loss_fields import SHAPE_NUMBERS
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.losses import ADVANTAGE_SHAPES

pytestmark = pytest.mark.short


def line(config, **loss) -> str:
    """The line that refuses these numbers of the loss; "" where they are accepted."""
    config.loss.update(loss)
    text = ""
    try:
        validate(config)
    except ConfigError as error:
        text = str(error)
    assert "\n" not in text
    assert not text or "--config." in text
    return text


@pytest.mark.parametrize(
    ("shape", "value", "wanted"),
    [
        ("power", 0.0, "a finite number above 0"),
        ("floor", 0.0, "a number between 0 and 0.5"),
        ("floor", 0.5, "a number between 0 and 0.5"),
        ("skew", 0.0, "a number between 0 and 1"),
        ("skew", 1.0, "a number between 0 and 1"),
        ("unlikely", 0.0, "a number between 0 and 1"),
        ("unlikely", 1.5, "a number between 0 and 1"),
    ],
)
def test_a_number_outside_the_range_of_its_shape(shape, value, wanted):
    got = line(opd.get_config(), advantage_shape=shape, advantage_shape_value=value)
    assert f"loss.advantage_shape_value={value} with loss.advantage_shape={shape}" in got
    assert f"wanted {wanted}; set --config.loss.advantage_shape_value=" in got
    repaired = float(got.rpartition("=")[2])
    assert not line(
        opd.get_config(), advantage_shape=shape, advantage_shape_value=repaired
    )  # the mend works


@pytest.mark.parametrize("shape", [s for s in ADVANTAGE_SHAPES if s not in SHAPE_NUMBERS])
def test_a_number_for_a_shape_that_has_none(shape):
    assert not line(opd.get_config(), advantage_shape=shape)
    got = line(opd.get_config(), advantage_shape=shape, advantage_shape_value=0.5)
    assert f"has no effect: loss.advantage_shape={shape} has no number" in got


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"advantage_shape": "sof_log"}, "set --config.loss.advantage_shape=soft_log"),
        ({"advantage_shape": "powr"}, "set --config.loss.advantage_shape=power"),
        (
            {"advantage_shape": "baseline", "discount": 0.9},
            "loss.advantage_shape=baseline with loss.discount=0.9",
        ),
        ({"extrapolation": 0.0}, "loss.extrapolation=0.0, wanted a finite number above 0"),
        (
            {"extrapolation": 1.25, "advantage": "support", "support": "student"},
            "loss.extrapolation=1.25 has no effect: it applies to the sampled token's advantage",
        ),
        (
            {"advantage_shape": "soft_log", "advantage": "support", "support": "student"},
            "loss.advantage_shape=soft_log has no effect",
        ),
        (
            {"extrapolation": 1.25, "advantage_shape": "baseline"},
            "wanted a shape of the log-ratio alone",
        ),
        (
            {"extrapolation": 1.25, "advantage_shape": "skew", "advantage_shape_value": 0.1},
            "wanted a shape of the log-ratio alone",
        ),
        (
            {"extrapolation": 1.25, "advantage_shape": "unlikely", "advantage_shape_value": 0.1},
            "loss.advantage_shape=unlikely does not read the teacher",
        ),
        ({"pg_weight": 0.0, "divergence_weight": 1.0, "extrapolation": 1.25}, "loss.pg_weight=0"),
        (
            {"evidence_share": 0.5},
            "loss.evidence_share=0.5 has no effect: there is no group-relative reward",
        ),
        ({"group_coef": 1.0, "evidence_clip": 0.1}, "loss.evidence_clip=0.1 has no effect"),
        ({"evidence_share": 1.5}, "loss.evidence_share=1.5, wanted a number, 0 to 1"),
        (
            {"group_coef": 1.0, "evidence_share": 0.5, "evidence_clip": 1.0},
            "loss.evidence_clip=1.0, wanted a number between 0 and 1",
        ),
        (
            {"group_coef": 1.0, "evidence_share": 0.5, "evidence_steps": -1},
            "loss.evidence_steps=-1",
        ),
    ],
)
def test_what_cannot_be_combined(loss, expected):
    assert expected in line(opd.get_config(), **loss)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"outcome": "margins"}, "set --config.loss.outcome=margin"),
        ({"outcome": "route"}, "loss.outcome_value=0.0 with loss.outcome=route, wanted a finite number"),
        ({"outcome": "margin", "outcome_value": -0.4}, "loss.outcome_value=-0.4"),
        ({"outcome_value": 0.4}, "loss.outcome_value=0.4 has no effect: loss.outcome=none has no number"),
        (
            {"outcome": "margin", "outcome_value": 0.4, "advantage": "support", "support": "student"},
            "loss.outcome=margin has no effect: it applies to the sampled token's advantage",
        ),
        (
            {"outcome": "route", "outcome_value": 1.0, "teacher_coef": 0.0, "group_coef": 1.0},
            "loss.outcome=route has no effect: loss.pg_weight=1 and loss.teacher_coef=0",
        ),
    ],
)  # fmt: skip
def test_outcomes_that_cannot_be_used(loss, expected):
    assert expected in line(opd.get_config(), **loss)


def test_outcomes_of_one_rollout_of_a_prompt():
    config = opd.get_config()
    config.rollout.samples_per_prompt = 1
    got = line(config, outcome="margin", outcome_value=0.4)
    assert got.endswith("set --config.rollout.samples_per_prompt=4")
    config = opd.get_config()
    config.rollout.samples_per_prompt = 1
    assert not line(config, outcome="route", outcome_value=1.0)


def test_evidence_without_a_teacher():
    got = line(grpo.get_config(), evidence_share=0.5)
    assert got.startswith("teacher.path='', wanted a Hugging Face folder")
    assert "loss.evidence_share" in got


def test_evidence_with_one_rollout_of_a_prompt():
    config = opd.get_config()
    config.rollout.samples_per_prompt = 1
    got = line(config, group_coef=1.0, evidence_share=0.5)
    assert got.endswith("set --config.rollout.samples_per_prompt=4")


def test_copies_of_the_student():
    config = opd.get_config()
    config.teacher.every = 5
    assert "teacher.every=5 has no effect: teacher.follow=frozen" in line(config)
    config.teacher.follow = "every"
    assert line(config).endswith("set --config.teacher.path=student")
    config.teacher.path = "student"
    assert not line(config)
    config.teacher.every = 0
    assert "teacher.every=0, wanted a whole number, at least 1" in line(config)
