"""The config tree: defaults, validation, and what a user reads after a mistake."""

import json
import pathlib
import re

import pytest

from configs import grpo, opd, opsd, recipes, sft, stable_opd, topk_opd
from opd_jax import config as configuration
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.training.terms import make_terms
from tests.support.paths import ROOT

pytestmark = pytest.mark.short
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "configs"


def with_field(field: str, value: object):
    config = stable_opd.get_config()
    section, _, name = field.rpartition(".")
    target = config[section] if section else config
    with target.ignore_type():
        target[name] = value
    return config


METHODS = {"stable_opd": stable_opd, "opd": opd, "sft": sft, "opsd": opsd, "topk_opd": topk_opd,
           "grpo": grpo}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_shipped_configs_are_valid(name, recipe):
    options = "" if recipe == "tiny" else ",data=problems.jsonl"
    validate(METHODS[name].get_config(recipe + options))


def test_the_recipe_is_tiny_where_none_is_named():
    named, unnamed = (opd.get_config(recipe).to_dict() for recipe in ("tiny", None))
    assert named == unnamed


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_golden_config(name, recipe, update_golden):
    """A changed default shows as a diff of a text file."""
    flat = configuration.flatten(METHODS[name].get_config(recipe).to_dict())
    here = str(pathlib.Path(opsd.__file__).parents[1])
    lines = [f"{k} = {json.dumps(v).replace(here, '.')}" for k, v in sorted(flat.items())]
    text = "\n".join(lines) + "\n"
    file = GOLDEN / f"{name}-{recipe}.txt"
    if update_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


def test_methods_differ_in_numbers_only():
    one = configuration.flatten(stable_opd.get_config().to_dict())
    other = configuration.flatten(opd.get_config().to_dict())
    assert {k for k in one if one[k] != other[k]} == {"loss.lambda_gold", "loss.beta_kl"}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "steps=0"),
        ("rollout.temperature", -1.0, "rollout.temperature=-1.0"),
        ("rollout.temperature", 0.0, "greedy"),
        ("rollout.temperature", float("nan"), "rollout.temperature=nan"),
        ("rollout.top_p", 0.0, "rollout.top_p=0.0"),
        ("rollout.top_p", 1.5, "0 to 1"),
        ("eval.best", "acuracy", "--config.eval.best=accuracy"),
        ("eval.best", "matched", "eval.match=''"),
        ("eval.fallbacks", ("box",), "names among answer_line, after_think, last_number"),
        ("grading.grader", "math-verify", "wanted one of guarded, math_verify"),
        ("grading.processes", -1, "grading.processes=-1, wanted a whole number, at least 0"),
        ("grading.seconds", 0.0, "grading.seconds=0.0, wanted a number, 0.1 to 30"),
        ("grading.seconds", 60.0, "grading.seconds=60.0"),
        ("optim.learning_rate", float("inf"), "finite"),
        ("optim.schedule", "cosin", "--config.optim.schedule=cosine"),
        (
            "optim.remat",
            "attn",
            "wanted one of none, attention, dots, full; set --config.optim.remat=",
        ),
        ("optim.remat", True, "optim.remat=True, wanted one of none, attention, dots, full"),
        ("optim.remat", False, "optim.remat=False, wanted one of none"),
        ("loss.kl_estimator", "k4", "full, k1, k2, k3"),
        ("loss.direction", "backward", "reverse, forward, jsd, skewed_reverse"),
        ("loss.jsd_beta", 1.0, "between 0 and 1"),
        ("loss.divergence_weight", -1.0, "loss.divergence_weight=-1.0"),
        ("loss.aggregation", "mean", "token, sequence"),
        ("student.dtype", "float8", "auto, float32, bfloat16"),
        ("student.path", "", "student.path"),
        ("sample.temperature", -1.0, "sample.temperature=-1.0"),
        ("sample.top_p", 0.0, "sample.top_p=0.0"),
        ("sample.batch", 0, "sample.batch=0"),
        ("sample.problems", -1, "sample.problems=-1"),
        ("data.train", "", "data.train='', wanted a file of problems"),
        ("data.prompt_template", "Solve it", "wanted a text that holds {problem}"),
        ("data.teacher_prompt_template", "{solution}", "wanted a text that holds {problem}"),
        ("data.system_prompt", "same", "the student's own texts"),
        ("data.bad_rows", "skp", "--config.data.bad_rows=skip"),
        ("data.epochs", -1.0, "data.epochs=-1.0"),
        ("scoring.special_tokens", "remapped", "--config.scoring.special_tokens=remap"),
        ("teacher.follow", "liv", "--config.teacher.follow=live"),
        ("teacher.follow", "live", "set --config.teacher.path=student"),
        ("teacher.decay", 1.5, "0 to 1"),
        ("scoring.mask_first", (1, 2), "scoring.mask_first"),
        ("scoring.mask_first", ("",), "scoring.mask_first"),
        ("seed", 2**33, "below 2**32"),
        ("student.max_position", -1, "student.max_position=-1"),
        ("eval.match", "(", "eval.match='(', wanted a regular expression"),
        ("teacher.path", "", "teacher.path"),
        ("optim.updates_per_rollout", 3, "--config.rollout.prompts_per_step=18"),
        ("optim.microbatch_tokens", 10, "--config.optim.microbatch_tokens="),
        ("optim.warmup_steps", -1, "optim.warmup_steps=-1"),
        ("optim.beta1", 1.0, "from 0 to below 1"),
        ("optim.beta2", 1.0, "from 0 to below 1"),
        ("loss.support", "teacher", "loss.support=teacher has no effect"),
        ("loss.top_k", 32, "--config.loss.divergence_weight=1"),
        ("guard.copies", -1, "guard.copies=-1"),
        ("log.every", "often", "log.every"),
        ("metrics.repetition_level", 0, "1 to 9"),
        ("metrics.repetition_level", 10, "1 to 9"),
        ("metrics.repeated_tokens", "tale", "--config.metrics.repeated_tokens=tail"),
        ("metrics.repeated_ngram", 1, "at least 2"),
        ("metrics.repeated_ngram", 2.5, "whole number"),
        ("metrics.positions", (16, 16), "metrics.positions=(16, 16), wanted whole numbers"),
        ("metrics.positions", (32, 16), "each above the one before"),
        ("metrics.positions", (0, 16), "whole numbers above 0"),
        ("metrics.positions", (1.5,), "metrics.positions=(1.5,)"),
        ("metrics.positions", (True,), "metrics.positions=(True,)"),
        ("metrics.positions", 16, "metrics.positions=16"),
        ("metrics.hedging", ("so what",), "words of letters"),
        ("metrics.hedging", ("",), "words of letters"),
        ("metrics.hedging", (1,), "words of letters"),
        ("metrics.hedging", "wait", "metrics.hedging='wait'"),
        ("rollout.prompts_per_step", 2.5, "whole number"),
    ],
)
def test_impossible_values_are_refused_in_one_line(field, value, says):
    with pytest.raises(ConfigError) as error:
        validate(with_field(field, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("metrics.positions", ()), ("metrics.hedging", ())])
def test_what_may_be_empty(field, value):
    validate(with_field(field, value))


def test_unknown_field_names_the_nearest():
    config = stable_opd.get_config()
    with config.unlocked():
        config.rollout.temprature = 1.0
    with pytest.raises(ConfigError, match=r"did you mean 'rollout\.temperature'"):
        validate(config)


@pytest.mark.parametrize("given", [["--config=FILE"], ["--config", "FILE"]])
def test_overrides_before_the_config_file(given):
    error = configuration.explain(ValueError("?"), ["train.py", "--config.steps=1", *given])
    assert str(error) == (
        "--config.steps=1 stands before --config, whose fields it sets; put --config=FILE first"
    )


def test_a_wrong_field_in_a_config_file_leads_to_the_right_one():
    config = opd.get_config()
    with pytest.raises(AttributeError) as raised:
        config.optim.lr = 1.0
    said = str(configuration.explain(raised.value, []))
    assert (
        said
        == "the config file sets 'lr', which is not a field; did you mean 'optim.learning_rate'?"
    )


def test_missing_field_is_named():
    config = stable_opd.get_config()
    with config.unlocked():
        del config.rollout.top_p
    with pytest.raises(ConfigError, match=r"config.rollout.top_p is missing"):
        validate(config)


def test_nothing_to_train_is_refused():
    config = opd.get_config()
    config.loss.pg_weight = 0.0
    with pytest.raises(ConfigError, match="nothing would be trained"):
        validate(config)


def test_recipe_options_set_what_most_runs_change():
    config = stable_opd.get_config(
        "qwen2.5-math-7b,student=a/b,teacher=r1-distill-7b,data=x.jsonl,eval=y.json"
    )
    assert config.student.path == "a/b"
    assert config.teacher.path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert (config.data.train, config.eval.data) == ("x.jsonl", "y.json")
    assert config.scoring.mask_first == ("<", "think")


def test_a_teacher_that_is_named_needs_no_help():
    alone = stable_opd.get_config("smollm2-135m,data=x.jsonl")
    assert alone.teacher.path == "student"
    assert "{solution}" in alone.data.teacher_prompt_template
    helped = stable_opd.get_config("smollm2-135m,data=x.jsonl,teacher=DIR")
    assert (helped.teacher.path, helped.data.teacher_prompt_template) == ("DIR", "same")


def test_options_that_a_method_would_override_are_refused_or_kept():
    assert sft.get_config().data.train == "tiny:sft"
    assert sft.get_config("tiny,data=mine.jsonl").data.train == "mine.jsonl"
    for method in (sft, opsd):
        with pytest.raises(
            ConfigError, match="got option 'teacher', wanted one of student=VALUE, d"
        ):
            method.get_config("tiny,teacher=x")


@pytest.mark.parametrize("option", ["techer=x", "teacher", "teacher=", ""])
def test_unknown_options_are_refused(option):
    with pytest.raises(ConfigError, match="wanted one of student=VALUE, teacher=VALUE"):
        opd.get_config(f"smollm2-135m,{option}")


TOPK = {"pg_weight": 0.0, "divergence_weight": 1.0, "support": "teacher"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"advantage": "divergence"}, "teaches nothing: its expected gradient is 0"),
        ({"advantage": "top_k"}, "--config.loss.advantage=support"),
        ({"advantage": "suport"}, "--config.loss.advantage=support"),
        ({"advantage": "support"}, "--config.loss.support=student"),
        ({"advantage": "support", "support": "union", "discount": 0.5}, "loss.discount=0.5 has no"),
        (
            {"advantage": "support", "support": "union", "importance_cap": 2.0},
            "loss.importance_cap=2.0 has no effect: it applies to the sampled token",
        ),
        ({"pg_weight": 0.0, "beta_kl": 0.1, "dual_clip": 3.0}, "no effect: loss.pg_weight=0"),
        ({"beta_kl": 0.1, "kl_clamp": 5.0}, "--config.loss.kl_estimator=k3"),
        ({"kl_estimator": "k3"}, "loss.kl_estimator=k3 has no effect: loss.beta_kl=0"),
        ({"truncated_tail": 8}, "--config.loss.truncated=tail"),
        (TOPK | {"jsd_beta": 0.1}, "no effect: loss.direction=reverse"),
        ({"teacher_coef": 0.0}, "every advantage is 0"),
        ({"dual_clip": 0.5}, "above 1, or 0"),
        ({"discount": 1.5}, "0 to 1"),
        ({"top_k": 0}, "loss.top_k=0"),
        (TOPK | {"top_k": 1, "form": "renormalised"}, "teaches nothing"),
        (TOPK | {"support": "full", "form": "tail"}, "all forms agree"),
        (TOPK | {"form": "stop_gradient", "direction": "forward"}, "wanted reverse"),
        (TOPK | {"support": "techer"}, "--config.loss.support=teacher"),
        (TOPK | {"form": "renormalized"}, "--config.loss.form=renormalised"),
        (TOPK | {"skew": 0.0}, "loss.skew=0.0, wanted a number between 0 and 1"),
        ({"gold_aggregation": "constant"}, "token, sequence"),
        ({"truncated": "tails"}, "keep, mask, tail"),
    ],
)
def test_losses_that_cannot_teach_or_would_be_ignored_are_refused(changes, says):
    config = opd.get_config()
    config.loss.update(changes)
    with pytest.raises(ConfigError, match=re.escape(says)):
        validate(config)


def test_a_group_of_one_is_refused():
    config = grpo.get_config()
    config.rollout.samples_per_prompt = 1
    with pytest.raises(ConfigError, match="samples_per_prompt=4"):
        validate(config)


def test_grpo_needs_no_teacher_and_takes_one_with_its_own_advantage():
    assert not make_terms(grpo.get_config()).needs_teacher
    config = grpo.get_config("smollm2-135m,teacher=DIR,data=problems.jsonl")
    config.loss.teacher_coef = 1.0
    validate(config)
    assert make_terms(config).needs_teacher


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        stable_opd.get_config("tyni")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("configs/opd", "did you mean configs/opd.py?"),
        ("nowhere", "give an experiment file, such as "),
    ],
)
def test_an_experiment_file_that_is_not_there(name, hint, monkeypatch):
    monkeypatch.chdir(ROOT)
    missing = FileNotFoundError(2, "No such file or directory", name)
    said = str(configuration.explain(missing, [f"--config={name}"]))
    assert said.startswith(f"--config={name} does not exist; {hint}")
