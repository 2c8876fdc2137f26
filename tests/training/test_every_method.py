"""What holds for each published method: masks, lone tokens, no token, equal rewards, gradients.

The rows of a step of every method in configs/methods.py, from scores without a model, and the gradient of the
surrogate in closed form.
"""

import argparse
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import methods
from opd_jax import losses
from opd_jax.grading.grader import Grade
from opd_jax.training.step import Step
from opd_jax.training.terms import Terms, make_terms
from opd_jax.types import RolloutRows
from tests.config.test_no_effect import experience
from tests.support import method_cost
from tests.training.test_topk_objective import MASK

pytestmark = pytest.mark.short
NAMES = list(methods.METHODS)
MIXED = (Grade.CORRECT, Grade.WRONG, Grade.CORRECT, Grade.CORRECT)


def rows_of(name: str, *, mask=MASK, outside=None, grades=MIXED) -> tuple[RolloutRows, Terms]:
    """Rows of a step; `outside` stands in every score outside the mask."""
    config = methods.get_config(name)
    config.rollout.samples_per_prompt, config.log.rollouts = 2, 0
    given = experience()

    def fill(x):
        wide = mask.reshape(mask.shape + (1,) * (x.ndim - 2))
        return x if outside is None or x.dtype.kind != "f" else np.where(wide, x, outside)

    scores = jax.tree.map(fill, given.scores)
    given = dataclasses.replace(given, scores=scores, mask_BT=mask, grades=list(grades))
    terms = make_terms(config)
    step = SimpleNamespace(
        setup=SimpleNamespace(terms=terms, tokenizer=SimpleNamespace(decode=str)), config=config,
        functions=SimpleNamespace(weigh=lambda x: losses.token_weights(x, config.loss.aggregation, length=7)),
    )  # fmt: skip
    batch = SimpleNamespace(problems=[SimpleNamespace(id="a"), SimpleNamespace(id="b")])
    return Step._rollout_rows(step, 2, given, batch, masking=False)[0], terms


def constants(rows: RolloutRows) -> list[np.ndarray]:
    """What methods make of the scores: weights, factors, advantages, gates; [B, T] each."""
    found = [rows.weight_BT, rows.token_factor_BT, rows.advantage_BT, rows.divergence_gate_BT]
    return [np.asarray(x) for x in found if x is not None]


@pytest.mark.filterwarnings("ignore:invalid value")  # of the column in rollouts.jsonl
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_outside_the_mask_changes_nothing(name):
    """NaN and infinities there give the bits that zeros give, also in a rollout that is masked as a whole."""
    mask = MASK.copy()
    mask[1] = False
    plain, _ = rows_of(name, mask=mask, outside=np.float32(0))
    for outside in (np.nan, -np.inf, np.inf):
        other, _ = rows_of(name, mask=mask, outside=np.float32(outside))
        for one, two in zip(constants(plain), constants(other), strict=True):
            np.testing.assert_array_equal(one, two)
        if (over_ids := plain.support_advantage_BTX) is not None:  # without a weight outside
            np.testing.assert_array_equal(over_ids[mask], other.support_advantage_BTX[mask])
    for x in constants(plain):
        assert np.isfinite(x[mask]).all()
    assert not plain.advantage_BT[~mask].any()
    assert not np.asarray(plain.weight_BT)[~mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_responses_of_one_token_none_and_equal_rewards(name):
    mask = MASK.copy()
    mask[0, np.flatnonzero(mask[0])[1:]] = False
    for given in (mask, MASK & False):
        rows, _ = rows_of(name, mask=given)
        assert all(np.isfinite(x[given]).all() for x in constants(rows))
        assert not rows.advantage_BT[~given].any()
    for grade in (Grade.CORRECT, Grade.WRONG, Grade.TIMEOUT):
        rows, terms = rows_of(name, grades=[grade] * 4)
        assert all(np.isfinite(x[MASK]).all() for x in constants(rows))
        if terms.group_coef and not terms.teacher_coef:
            assert not rows.advantage_BT.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_surrogate_is_the_weighted_advantage_in_float64(name):
    """At ratio 1: -w_t A_t (onehot(y_t) - p), in the logits of every prefix; also by finite differences."""
    rows, terms = rows_of(name)
    if not terms.pg_weight or terms.on_support:
        return
    generator = np.random.default_rng(1)
    token_BT = generator.integers(0, 5, MASK.shape)
    weight_BT = np.float64(rows.weight_BT)
    if rows.token_factor_BT is not None:
        weight_BT = weight_BT * rows.token_factor_BT
    with jax.enable_x64(True):
        logits = jnp.asarray(generator.normal(size=(*MASK.shape, 5)))
        at = jax.nn.log_softmax(logits)
        old_BT = jnp.take_along_axis(at, token_BT[..., None], axis=-1)[..., 0]

        def loss(x):
            every = jax.nn.log_softmax(x)
            each_BT = losses.clipped_surrogate(
                logprob_BT=jnp.take_along_axis(every, token_BT[..., None], axis=-1)[..., 0],
                sampler_logprob_BT=old_BT, advantage_BT=jnp.asarray(np.float64(rows.advantage_BT)),
                clip_low=terms.clip_low, clip_high=terms.clip_high, dual_clip=terms.dual_clip or float("inf"),
            )  # fmt: skip
            return jnp.sum(weight_BT * each_BT)

        gradient = jax.grad(loss)(logits)
        onehot = np.eye(5)[token_BT]
        pull = (weight_BT * rows.advantage_BT)[..., None]
        np.testing.assert_allclose(gradient, -pull * (onehot - np.exp(at)), atol=1e-12)
        direction = jnp.asarray(generator.normal(size=logits.shape))
        along = (loss(logits + 1e-6 * direction) - loss(logits - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(jnp.sum(gradient * direction), along, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vopd", "tip", "scope", "eopd"])
def test_a_function_of_scores_has_the_programs_of_opd(name):
    """Its step costs what OPD's costs, but for the rows; a divergence over a support has others."""
    options = argparse.Namespace(recipe="tiny", student=None, teacher=None)
    config = method_cost.config_of(name, options)
    texts = [method_cost.programs_of(x) for x in (method_cost.baseline_of(config, options), config)]
    other = {key for key, text in texts[1].items() if text not in texts[0].values()}
    assert {key.split()[0] for key in other} == ({"score", "gradient"} if name == "eopd" else set())
