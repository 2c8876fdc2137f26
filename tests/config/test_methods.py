"""configs/methods.py: every published method is a valid config, and only a set of numbers."""

import re

import pytest

from configs import grpo, methods, opd, opsd, recipes, stable_opd
from opd_jax import config as configuration
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.training.terms import make_terms
from tests.support.paths import ROOT

pytestmark = pytest.mark.short


def flat(config) -> dict:
    return configuration.flatten(config.to_dict())


def difference(one, other) -> dict:
    one, other = flat(one), flat(other)
    return {field: value for field, value in one.items() if other[field] != value}


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_method_is_a_valid_config_of_every_recipe(name, recipe):
    options = "" if recipe == "tiny" else ",data=problems.jsonl"
    config = methods.get_config(f"{name},{recipe}{options}")
    validate(config)
    make_terms(config)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_changes_its_own_numbers_and_what_tiny_needs(name):
    changed = difference(methods.get_config(name), opd.get_config())
    own = methods.METHODS[name].numbers
    of_tiny = {"loss.top_k", "loss.golden_top_k", "sample.choose_top_k", "loss.low_kl_window",
               "loss.token_weight_window", "rollout.prompts_per_step", "rollout.max_prompt_tokens",
               "data.prompt_template", "data.teacher_prompt_template", "data.teacher_system_prompt",
               "teacher.path", "eval.teacher"}  # fmt: skip
    if "harness.prompt" in own:
        of_tiny |= {"harness.prompt", "harness.max_tokens"}
    if methods.METHODS[name].horizon or "rollout.max_response_tokens" in own:
        of_tiny |= {"rollout.horizon", "rollout.max_response_tokens", "eval.max_response_tokens"}
    assert changed.keys() - own.keys() <= of_tiny
    config = flat(methods.get_config(name))
    assert all(config[field] == own[field] for field in own.keys() - of_tiny)


def test_methods_that_have_a_file_of_their_own_are_the_same():
    for name, file in (("opd", opd), ("stable_opd", stable_opd), ("grpo", grpo), ("opsd", opsd)):
        assert flat(methods.get_config(name)) == flat(file.get_config())


def test_numbers_of_a_papers_run_are_left_out_of_small_recipes():
    small, large = (
        methods.get_config(f"exopd,{name},data=x.jsonl") for name in ("smollm2-135m", "qwen3-1.7b")
    )
    assert small.rollout.prompts_per_step == 4
    assert (large.rollout.prompts_per_step, large.rollout.max_response_tokens) == (1024, 16_384)
    assert large.loss.importance_cap == 5.0
    assert large.optim.microbatch_tokens >= 1024 + 16_384


@pytest.mark.parametrize(
    ("name", "horizon", "last", "answers"),
    [("topd", (), 16, 160), ("esr", (), 100, 160), ("popd", (20, 40, 80), 160, 0)],
)
def test_short_rollouts_leave_the_answers_to_held_out_problems_their_budget(
    name, horizon, last, answers
):  # fmt: skip
    config = methods.get_config(name)  # tiny: 160 tokens
    assert (config.rollout.horizon, config.rollout.max_response_tokens) == (horizon, last)
    assert config.eval.max_response_tokens == answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vopdd", "method 'vopdd' is not known; did you mean 'vopd'?"),
        ("exo_opd", "did you mean 'exopd'?"),
        ("", "method '' is not known; known: "),
        (None, "--config=configs/methods.py:vopd"),
        ("vopd,tinny", "recipe 'tinny' is not known; did you mean 'tiny'?"),
        ("vopd,modell=x", "got option 'modell'"),
        ("rlsd,teacher=x", "got option 'teacher'"),
        ("opct,tiny,teacher=x", "got option 'teacher'"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(text, expected):
    with pytest.raises(ConfigError) as caught:
        methods.get_config(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_follow_the_name_with_or_without_a_recipe():
    for text in ("vopd,teacher=DIR", "vopd,tiny,teacher=DIR"):
        assert methods.get_config(text).teacher.path == "DIR"


def test_every_number_has_its_mark_and_every_method_its_row_in_the_documentation():
    text = (ROOT / "configs" / "methods.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert not [name for name in methods.METHODS if f"`{name}`" not in page]
    for method in methods.METHODS.values():
        assert re.search(r"\d{4}\.\d{5}", method.source)
    table = text[text.index("METHODS: dict") : text.index("def get_config")]
    numbers = [line for line in table.splitlines() if re.search(r'\w\.\w+": [-\d]', line)]
    marks = re.compile(r"# .*(?:found|second-hand|unknown|inferred|TRL|LUFFY)")
    assert len(numbers) > 20
    assert not [line for line in numbers if not marks.search(line)]
