"""What other shapes and token weights would have changed: vectors of w_t A_t, compared on the host."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from configs import methods, opd
from opd_jax import losses, train
from opd_jax.config.fields import FIELDS
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.training import variants
from opd_jax.training.step import Step
from opd_jax.training.terms import make_terms
from opd_jax.types import RolloutRows
from tests.config.test_no_effect import experience
from tests.support.small_run import lines, small
from tests.training.test_topk_objective import MASK

METHOD_OF = {
    "log_ratio": "opd", "clamp": "clamped_opd", "extrapolation": "exopd", "baseline": "vopd",
    "power": "power_opd", "soft_log": "soft_log_opd", "floor": "reopold", "skew": "skewed_opd",
    "f_reverse": "opd_plus_reverse", "f_forward": "opd_plus_forward", "f_jsd": "opd_plus_jsd",
    "f_total_variation": "tv_opd", "unlikely": "unlikely_control", "unweighted": "opd", "iw": "iw_opd",
    "prune": "prune_opd", "step": "sod", "fire": "fire_opd", "tip": "tip", "ta": "ta_opd",
    "selectkd": "selectkd",
}  # fmt: skip
NEED_MORE = {"ta", "selectkd", "extrapolation"}


def names_in(found: dict[str, float]) -> set[str]:
    names = [key.removesuffix("_cosine") for key in found if key.endswith("_cosine")]
    return {name.removeprefix("variant/") for name in names}


def rows_of(advantage, weight, factor=None) -> RolloutRows:
    zeros = np.zeros(np.shape(weight), np.float32)
    return RolloutRows(
        tokens_BT=zeros, length_B=zeros[:, 0], weight_BT=np.asarray(weight, np.float32),
        advantage_BT=np.asarray(advantage, np.float32), sampler_logprob_BT=zeros,
        token_factor_BT=factor,
    )  # fmt: skip


def run(change=lambda config: None, *, scores=None, masking=False, number=2):
    """The rows of a step with a teacher and without models, and its metrics."""
    config = opd.get_config()
    config.log.variants, config.rollout.samples_per_prompt, config.log.rollouts = 2, 2, 0
    change(config)
    given = experience()
    given = dataclasses.replace(given, scores=scores or given.scores)
    step = SimpleNamespace(
        setup=SimpleNamespace(terms=make_terms(config), tokenizer=SimpleNamespace(decode=str)),
        config=config,
        functions=SimpleNamespace(weigh=lambda mask: losses.token_weights(mask, "sequence")),
    )  # fmt: skip
    batch = SimpleNamespace(problems=[SimpleNamespace(id="a"), SimpleNamespace(id="b")])
    rows, _, news = Step._rollout_rows(step, number, given, batch, masking)
    return rows, news, given


def test_two_tokens_by_hand():
    """(3, 4) / 2 and (4, 3): cosine 24 / 25, norms 2.5 and 5."""
    own = variants.token_vector(rows_of([[3.0, 4.0]], [[0.5, 0.5]]))
    other = variants.token_vector(rows_of([[4.0, 3.0]], [[1.0, 1.0]]))
    found = variants.agreement(own_BT=own, other_BT=other)
    assert found == {"norm_ratio": 2.0, "cosine": pytest.approx(0.96, abs=1e-15)}
    opposite = variants.agreement(own_BT=own, other_BT=-own)
    assert opposite == {"norm_ratio": 1.0, "cosine": -1.0}


def test_factors_of_the_weights_are_part_of_the_vector():
    vector = variants.token_vector(rows_of([[3.0, 4.0]], [[0.5, 0.5]], np.array([[2.0, 0.0]])))
    np.testing.assert_array_equal(vector, [[3.0, 0.0]])


def test_masked_tokens_do_not_count():
    rows = rows_of([[3.0, np.inf, 4.0]], [[1.0, 0.0, 1.0]])
    other = rows_of([[3.0, np.nan, 4.0]], [[1.0, 0.0, 1.0]])
    found = variants.agreement(
        own_BT=variants.token_vector(rows), other_BT=variants.token_vector(other)
    )
    assert found == {"norm_ratio": 1.0, "cosine": 1.0}


def test_numbers_that_are_not_defined_are_left_out():
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    assert variants.agreement(own_BT=zero, other_BT=one) == {}
    assert variants.agreement(own_BT=zero, other_BT=zero) == {}
    assert variants.agreement(own_BT=one, other_BT=zero) == {"norm_ratio": 0.0}
    assert variants.agreement(own_BT=one, other_BT=one * np.nan) == {}


def test_every_shape_and_rule_has_a_variant_with_the_numbers_of_its_method():
    shapes = {numbers.get("advantage_shape") for numbers in variants.VARIANTS.values()}
    rules = {numbers.get("token_weight") for numbers in variants.VARIANTS.values()}
    assert shapes - {None} == set(losses.ADVANTAGE_SHAPES)
    assert rules - {None} == set(losses.TOKEN_WEIGHTS)
    assert variants.VARIANTS.keys() == METHOD_OF.keys()
    for name, numbers in variants.VARIANTS.items():
        method = methods.METHODS[METHOD_OF[name]].numbers
        for field, value in numbers.items():
            default = FIELDS[f"loss.{field}"].default
            assert method.get(f"loss.{field}", default) == value, (name, field)
        read = {
            field.removeprefix("loss.") for field in method
            if field.startswith(("loss.advantage", "loss.extrapolation", "loss.token_weight"))
        }  # fmt: skip
        assert read - numbers.keys() <= {"token_weight_top_k"}


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_the_variant_that_the_run_has_is_exactly_itself(name):
    def change(config):
        config.loss.update(variants.VARIANTS[name])

    _, found, _ = run(change)
    assert found[f"variant/{name}_cosine"] == 1.0
    assert found[f"variant/{name}_norm_ratio"] == 1.0
    assert all(math.isfinite(value) for value in found.values())
    assert sum(value == 1.0 for value in found.values()) < len(found) - 10


def test_a_variant_is_the_run_that_has_its_numbers():
    plain, found, _ = run()
    own = variants.token_vector(plain)
    for name in names_in(found):

        def change(config, name=name):
            config.loss.update(variants.VARIANTS[name])

        rows, _, _ = run(change)
        pair = variants.agreement(own_BT=own, other_BT=variants.token_vector(rows))
        assert {f"variant/{name}_{key}": x for key, x in pair.items()}.items() <= found.items()


def test_what_was_not_scored_is_left_out():
    scores = experience().scores.replace(statistic_BT=None, reference_logprob_BT=None)
    _, found, _ = run(scores=scores)
    assert names_in(found) == variants.VARIANTS.keys() - NEED_MORE

    def of_ta(config):
        config.loss.token_weight = "ta"

    _, found, _ = run(of_ta)
    assert names_in(found) == variants.VARIANTS.keys() - {"selectkd"}


def test_combinations_that_are_refused_are_left_out():
    def extrapolated(config):
        config.loss.extrapolation = 1.5

    _, found, _ = run(extrapolated)
    absent = {"baseline", "power", "skew", "unlikely", "ta", "selectkd"}
    assert names_in(found) == variants.VARIANTS.keys() - absent

    def discounted(config):
        config.loss.discount = 0.5

    _, found, _ = run(discounted)
    assert "baseline" not in names_in(found)
    assert "power" in names_in(found)


def test_tokens_that_the_guard_masks_do_not_count():
    given = experience()
    scores = given.scores
    gap_BT = np.where(given.repeated_BT, 1e4, scores.teacher_logprob_BT).astype(np.float32)
    other = scores.replace(teacher_logprob_BT=gap_BT)
    shapes = ("log_ratio", "soft_log", "floor", "f_jsd")

    def numbers(scores, masking):
        _, found, _ = run(scores=scores, masking=masking)
        return [found[f"variant/{name}_norm_ratio"] for name in shapes]

    assert (given.repeated_BT & MASK).any()
    assert numbers(scores, True) == numbers(other, True)
    assert numbers(scores, False) != numbers(other, False)


def test_equal_models_give_no_number():
    scores = experience().scores
    _, found, _ = run(scores=scores.replace(teacher_logprob_BT=scores.student_logprob_BT))
    assert found == {}


@pytest.mark.parametrize(("every", "number"), [(0, 2), (3, 2)])
def test_nothing_is_compared_in_other_steps(monkeypatch, every, number):
    monkeypatch.setattr(variants, "compare", None)

    def change(config):
        config.log.variants = every

    rows, found, _ = run(change, number=number)
    assert FIELDS["log.variants"].default == 0
    assert found == {}
    assert rows.advantage_BT.any()


def test_a_gate_that_replaces_the_surrogate_is_in_every_vector():
    """Where the gate is open nothing is left of the surrogate, so an open gate leaves no number."""

    def gated(threshold):
        def change(config):
            config.loss.update(divergence_weight=1.0, direction="forward", support="teacher")
            config.loss.update(gate="advantage", gate_threshold=threshold)

        return change

    assert run(gated(1.0))[1] == {}
    assert names_in(run(gated(0.0))[1]) >= {"log_ratio", "power", "tip"}


@pytest.mark.parametrize(
    "loss",
    [
        {"pg_weight": 0.0, "divergence_weight": 1.0},
        {"teacher_coef": 0.0, "group_coef": 1.0},
        {"advantage": "support", "support": "student"},
    ],
)
def test_refused_without_a_surrogate_of_sampled_tokens_with_a_teacher(loss):
    config = opd.get_config()
    config.rollout.samples_per_prompt = 4
    config.loss.update(loss)
    validate(config)
    config.log.variants = 10
    with pytest.raises(ConfigError) as error:
        validate(config)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("log.variants=10")
    assert text.endswith("set --config.log.variants=0")


@pytest.mark.slow
def test_a_run_logs_them_now_and_then_and_learns_the_same(folders, tmp_path):
    config = small(folders, "opd")
    config.steps, config.eval.data, config.log.variants = 2, "", 2
    train.run(config, str(tmp_path / "run"), command=[])
    _, first, second = lines(tmp_path / "run", "metrics.jsonl")
    assert not any(key.startswith("variant/") for key in first)
    assert names_in(second) == variants.VARIANTS.keys() - NEED_MORE
    assert second["variant/log_ratio_cosine"] == second["variant/unweighted_norm_ratio"] == 1.0
    config.log.variants = 0
    train.run(config, str(tmp_path / "plain"), command=[])
    plain = lines(tmp_path / "plain", "metrics.jsonl")[2]
    assert plain["loss/total"] == second["loss/total"]
    assert plain["optim/grad_norm"] == second["optim/grad_norm"]
