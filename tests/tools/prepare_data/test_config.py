"""The config of prepare_data: values that cannot be are refused in one line."""

import pytest

from configs import prepare_data
from opd_jax.errors import ConfigError
from opd_jax.tools.prepare_data import config as prepare_config
from tests.support.prepared import config


def changed(field: str, value: object):
    made = config("x.jsonl")
    *sections, name = field.split(".")
    target = made
    for section in sections:
        target = target[section]
    with made.unlocked(), target.ignore_type():
        target[name] = value
    return made


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "data.train",
            "",
            "data.train='' names no file to prepare; set --config.data.train=FILE",
        ),
        ("data.bad_rows", "drop", "one of refuse, skip"),
        ("data.trian", "x", "did you mean 'data.train'"),
        ("filter.max_tokens", 0, "filter.max_tokens=0, wanted a whole number, at least 1"),
        ("filter.max_tokens", 2.5, "a whole number"),
        ("filter.grade", 1, "True or False"),
        ("filter.answer", 0, "True or False"),
        ("decontaminate.ngram", -1, "at least 0"),
        ("decontaminate.ngram_share", 0.0, "above 0 to 1"),
        ("decontaminate.embedding_cosine", 1.5, "-1 to 1"),
        ("decontaminate.embedding_cosine", float("nan"), "-1 to 1"),
        (
            "decontaminate.benchmarks.mine",
            3,
            "decontaminate.benchmarks.mine=3, wanted a text",
        ),
        ("split.opd_share", 1.5, "0 to 1"),
        ("block", 0, "at least 1"),
        ("seed", -1, "at least 0"),
    ],
)
def test_impossible_values_are_refused_in_one_line(field, value, says):
    with pytest.raises(ConfigError) as error:
        prepare_config.validate(changed(field, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_valid_configs():
    for recipe in prepare_data.RECIPES:
        made = prepare_data.get_config(recipe)
        made.data.train = "x.jsonl"
        prepare_config.validate(made)
    prepare_config.validate(changed("decontaminate.benchmarks.mine", "m.jsonl"))
    with pytest.raises(ConfigError, match="did you mean 'openr1-math'"):
        prepare_data.get_config("openr1math")
    with pytest.raises(ConfigError, match=r"filter\.grade=True needs solutions and answers"):
        prepare_config.validate(config("x", filter__grade=True, filter__answer=False))
    made = config("x")
    with made.unlocked():
        del made.filter.grade
    with pytest.raises(ConfigError, match=r"config\.filter\.grade is missing"):
        prepare_config.validate(made)


def test_openr1_recipe_takes_generations():
    made = prepare_data.get_config("openr1-math")
    assert (made.split.sft, made.split.opd, made.filter.max_tokens) == (33_000, 0, 8192)
    assert made.data.columns.solution == "generations"
