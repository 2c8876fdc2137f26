"""The table of fields: its defaults are allowed values, its page is docs/config.md."""

import subprocess
import sys

import pytest

from configs import evaluate as evaluate_config
from configs import opd
from opd_jax.config import (
    EVALUATION,
    SAMPLING,
    TRAINING,
    default,
    flatten,
)
from opd_jax.config.fields import FIELDS
from opd_jax.config.page import as_markdown, as_text
from opd_jax.config.record import Choices, Field, Range, Rule
from opd_jax.config.schema import check_value
from opd_jax.config.trees import TREES
from opd_jax.config.validate import validate_evaluation, validate_sampling
from opd_jax.errors import ConfigError
from opd_jax.sharding.partition import ROLES
from opd_jax.training.optimizer import make_schedule
from tests.support.paths import ROOT

pytestmark = pytest.mark.short
TO_BE_GIVEN = {"student.path"}  # without a default that a run could start with


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - TO_BE_GIVEN))
def test_a_default_is_an_allowed_value(name):
    check_value(name, FIELDS[name].default, FIELDS[name])


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_says_what_it_means_in_a_sentence(name):
    assert FIELDS[name].meaning.endswith((".", "NAME=FILE,..."))


def test_the_page_is_the_table():
    """Written anew by: python -m opd_jax.config > docs/config.md."""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == as_markdown()


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.program)
def test_the_text_of_an_entry_point_has_its_fields_and_no_others(tree):
    lines = [line.split(" = ")[0].strip() for line in as_text(tree).splitlines() if " = " in line]
    assert [line for line in lines if line in FIELDS] == list(tree.fields)


@pytest.mark.parametrize(
    ("allowed", "default", "good", "bad", "says"),
    [
        (Range(1), 1, (1, 2**40), (0, 1.5, True, 2**63, "1"), "a whole number, at least 1"),
        (
            Range(0),
            0.5,
            (0, 1e30),
            (-1.0, float("inf"), float("nan")),
            "a finite number, at least 0",
        ),
        (Range(0, 1), 0.5, (0, 1.0), (-0.1, 1.1), "a number, 0 to 1"),
        (Range(above=0, high=1), 0.5, (1.0, 1e-9), (0.0, 1.1), "a number, above 0 to 1"),
        (Range(above=0, below=1), 0.5, (0.5,), (0.0, 1.0), "a number between 0 and 1"),
        (Range(0, below=1), 0.5, (0.0,), (1.0,), "a number from 0 to below 1"),
        (
            Range(above=1, also=(0,)),
            0.0,
            (0.0, 1.5),
            (1.0, 0.5, -1.0),
            "a finite number above 1, or 0",
        ),
        (
            Range(0, below=2**32),
            0,
            (0, 2**32 - 1),
            (2**32, -1),
            "a whole number from 0 to below 2**32",
        ),
        (Choices(("a", "b")), "a", ("a", "b"), ("c", 1, None), "one of a, b"),
        (
            Rule("an even length", lambda x: len(x) % 2 == 0),
            "",
            ("", "ab"),
            ("a",),
            "an even length",
        ),
        (None, True, (True, False), (1, "True"), "True or False"),
    ],
    ids=[
        "count",
        "from 0",
        "share",
        "above 0",
        "between",
        "below",
        "off or above",
        "seed",
        "choices",
        "rule",
        "switch",
    ],
)
def test_values_against_a_record(allowed, default, good, bad, says):
    field = Field("x", default, allowed, "")
    assert field.wanted() == says
    for value in good:
        check_value("a.x", value, field)
    for value in bad:
        with pytest.raises(ConfigError, match=r"^a\.x=.*, wanted .*; set --config\.a\.x="):
            check_value("a.x", value, field)


def test_names_that_the_table_shares_with_the_code():
    """Where the module that has the choices lies above this one, or would load JAX with the command line."""
    others = ("replay.path", "lora.path")
    folders = tuple(name for name in FIELDS if name.endswith(".path") and name not in others)
    assert folders == tuple(f"{r}.path" for r in ROLES)
    section = default().optim
    for name in FIELDS["optim.schedule"].allowed.names:
        with section.ignore_type():
            section.schedule = name
        make_schedule(section, 10)


def test_the_command_line_is_read_before_jax_is_loaded():
    """glibc's allocator is set before JAX starts threads (host_memory.py), also where overrides are wrong."""
    code = (
        "import sys, opd_jax.cli, opd_jax.config as c; c.explain(ValueError(), ['--config.x=1']);"
        "found = {'jax', 'flax', 'grain'} & sys.modules.keys(); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_a_tree_takes_its_fields_of_an_experiment():
    config = opd.get_config()
    config.steps, config.sample.problems, config.metrics.positions = 7, 11, (1, 2)
    trained, sampled = TRAINING.of(config), SAMPLING.of(config)
    assert (trained.steps, trained.metrics.positions, sampled.sample.problems) == (7, (1, 2), 11)
    assert set(flatten(trained.to_dict())) == set(TRAINING.fields)
    assert set(flatten(sampled.to_dict())) == set(SAMPLING.fields)
    assert "sample" not in trained
    assert "loss" not in sampled


def test_training_needs_no_other_section_and_checks_the_one_that_is_there():
    from opd_jax.config.validate import validate

    config = opd.get_config()
    validate(TRAINING.of(config))
    config.sample.batch = 0
    with pytest.raises(ConfigError, match=r"sample\.batch=0, wanted a whole number, at least 1"):
        validate(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eval.batch": 0}, "eval.batch=0"),
        ({"eval.samples": -1}, "eval.samples=-1"),
        ({"eval.top_p": 0.0}, "eval.top_p=0.0"),
        ({"eval.fallbacks": ("box",)}, "names among answer_line"),
        ({"data.prompt_template": "Solve it"}, "a text that holds {problem}"),
        ({"data.prompt_template": "{problem} {answer}"}, "a text without {answer}"),
        ({"data.date": "31.1.2026"}, "a day as YYYY-MM-DD"),
        ({"eval.temperature": 0.0, "eval.samples": 2}, "the same answer every time"),
        ({"grading.seconds": 60.0}, "0.1 to 30"),
        ({"mesh.fsdp": 0}, "mesh.fsdp=0"),
        ({"student.dtype": "float8"}, "auto, float32, bfloat16"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused(changes, says):
    config = evaluate_config.get_config()
    validate_evaluation(config)
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    with pytest.raises(ConfigError) as error:
        validate_evaluation(config)
    assert says in str(error.value)


def test_an_evaluation_takes_no_field_of_training():
    config = evaluate_config.get_config()
    with config.unlocked():
        config.eval.match = "x"
    with pytest.raises(
        ConfigError, match=r"eval\.match is not a field that launch/evaluate\.py reads"
    ):
        validate_evaluation(config)
    assert set(flatten(config.to_dict())) - {"eval.match"} == set(EVALUATION.fields)


def test_greedy_sampling_of_several_solutions_is_refused():
    config = opd.get_config()
    config.sample.temperature, config.sample.samples = 0.0, 2
    with pytest.raises(ConfigError, match="the same solution every time"):
        validate_sampling(config)
