"""One step: micro-batches, order and donation change nothing; methods are limits of each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import losses
from opd_jax.config.fields import default
from opd_jax.models import decoder
from opd_jax.training import objective, optimizer, update
from opd_jax.training.terms import default_terms
from opd_jax.types import Frozen, GoldenRows, RolloutRows
from tests.conftest import distance, random_params, random_rows, tiny_config

pytestmark = pytest.mark.short

CONFIG = tiny_config(num_layers=1)
PARAMS, REFERENCE = random_params(CONFIG, seed=0), random_params(CONFIG, seed=1)
B, T = 5, 8  # 5 rows divide into neither 2 nor 3


def section(**changes: object):
    """The config section `optim`."""
    optim = default().optim
    optim.update({"learning_rate": 1e-3, "weight_decay": 0.1} | changes)
    return optim


OPTIMIZERS = {"sgd": optax.sgd(0.1), "adamw": optimizer.make_optimizer(section(), 10)}


def make_rows(seed: int) -> RolloutRows:
    """Tokens from 2 on count, all the same."""
    tokens_BT, length_B = random_rows(CONFIG, B, T, seed)
    position = np.arange(T)[None]
    mask_BT = (position >= 2) & (position < np.asarray(length_B)[:, None])
    noise = np.random.default_rng(seed).normal(size=(2, B, T)).astype(np.float32)
    return RolloutRows(
        tokens_BT=tokens_BT,
        length_B=length_B,
        weight_BT=losses.token_weights(mask_BT, "token"),
        advantage_BT=jnp.asarray(noise[0]),
        sampler_logprob_BT=jnp.asarray(-3.0 + 0.1 * noise[1]),
    )


ROWS = make_rows(seed=0)
GOLDEN = GoldenRows(
    *(getattr(make_rows(seed=1), f) for f in ("tokens_BT", "length_B", "weight_BT"))
)


def permuted(rows):
    return jax.tree.map(lambda x: x[np.array([3, 0, 4, 2, 1])], rows)


# Cheap stand-ins for the two losses: a row is its advantages, pushed through one layer.

TOY_PARAMS = {
    "dense": {
        "kernel": jnp.asarray(np.random.default_rng(2).normal(size=(T, T)), jnp.float32),
        "bias": jnp.ones(T),
    }
}


def weighted(parts, weights):
    """What a loss returns: the weighted sum of its terms, and the terms."""
    return sum((weights[name] * x for name, x in parts.items()), jnp.zeros(())), parts


def toy_rollout_loss(params, reference, rows, weights):
    width = rows.advantage_BT.shape[1]
    kernel, bias = params["dense"]["kernel"][:width, :width], params["dense"]["bias"][None, :width]
    y_BT = jnp.tanh(jnp.where(rows.weight_BT > 0, rows.advantage_BT, 0.0) @ kernel + bias)
    return weighted({"opd": jnp.sum(rows.weight_BT * y_BT**2)}, weights)


def toy_golden_loss(params, _, rows, weights):
    bias = params["dense"]["bias"][None, : rows.tokens_BT.shape[1]]
    return weighted({"sft": jnp.sum(rows.weight_BT * rows.tokens_BT * bias**2)}, weights)


ONES = {"opd": 1.0, "divergence": 0.0, "reference_kl": 0.0, "sft": 1.0, "golden_divergence": 0.0}


def make_step(
    tx, rollout_loss, golden_loss, *, tokens: int, dtype=jnp.float32, weights=ONES, decay=0.0
):
    """step(state, frozen, rollout_rows, golden_rows) with these weights."""
    accumulate = update.make_accumulate(
        rollout_loss, golden_loss, microbatch_tokens=tokens, dtype=dtype
    )
    step = update.make_update(tx, accumulate, decay=decay)
    return functools.partial(lambda weights, *rest: step(*rest, weights), weights)


def toy_update(tx, rows: int = B, dtype=jnp.float32):
    return make_step(tx, toy_rollout_loss, toy_golden_loss, tokens=rows * T, dtype=dtype)


@functools.cache
def model_update(*, golden: float, beta: float, limbs: bool, rows: int = B):
    """SGD on the model; `limbs`: with golden loss and reference, whatever their weights are."""
    terms = default_terms(
        pg_weight=1.0,
        lambda_gold=golden,
        beta_kl=beta,
        traced_at_zero=("reference_kl", "sft") if limbs else (),
    )
    shared = {"token_chunk": 16, "remat": "none"}
    return make_step(
        OPTIMIZERS["sgd"],
        objective.make_rollout_loss(terms, CONFIG, CONFIG, **shared),
        objective.make_golden_loss(terms, CONFIG, **shared) if limbs else None,
        tokens=rows * T,
        weights=terms.weights,
    )


def sgd_state():
    return update.init_state(fresh(PARAMS), OPTIMIZERS["sgd"])


def fresh(params):
    """A copy: the state takes its parameters over, and the update donates them."""
    return jax.tree.map(jnp.copy, params)


def moved(params, start=PARAMS):
    """What the step did to the parameters."""
    return jax.tree.map(jnp.subtract, params, start)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_change_nothing(name, rows):
    tx = OPTIMIZERS[name]
    whole, whole_metrics = toy_update(tx)(
        update.init_state(fresh(TOY_PARAMS), tx), Frozen(), ROWS, GOLDEN
    )
    split, split_metrics = toy_update(tx, rows)(
        update.init_state(fresh(TOY_PARAMS), tx), Frozen(), ROWS, GOLDEN
    )
    assert distance(split.params, whole.params) < 1e-6
    assert distance(moved(split.params, TOY_PARAMS), moved(whole.params, TOY_PARAMS)) < 1e-5
    for key, value in whole_metrics.items():
        np.testing.assert_allclose(split_metrics[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.slow
def test_micro_batches_change_nothing_with_the_model():
    whole, _ = model_update(golden=0.3, beta=0.2, limbs=True)(
        sgd_state(), Frozen(reference=REFERENCE), ROWS, GOLDEN
    )
    split, _ = model_update(golden=0.3, beta=0.2, limbs=True, rows=2)(
        sgd_state(), Frozen(reference=REFERENCE), ROWS, GOLDEN
    )
    assert distance(split.params, whole.params) < 1e-6
    assert distance(moved(split.params), moved(whole.params)) < 1e-5


@pytest.mark.slow
def test_order_of_rows_changes_nothing():
    step = model_update(golden=0.3, beta=0.2, limbs=True)
    one, _ = step(sgd_state(), Frozen(reference=REFERENCE), ROWS, GOLDEN)
    other, _ = step(sgd_state(), Frozen(reference=REFERENCE), permuted(ROWS), permuted(GOLDEN))
    assert distance(moved(other.params), moved(one.params)) < 1e-5


@pytest.mark.slow
def test_weights_of_zero_give_plain_opd_bit_for_bit():
    plain, plain_metrics = model_update(golden=0.0, beta=0.0, limbs=False)(
        sgd_state(), Frozen(), ROWS, None
    )
    limbs, metrics = model_update(golden=0.0, beta=0.0, limbs=True)(
        sgd_state(), Frozen(reference=REFERENCE), ROWS, GOLDEN
    )
    jax.tree.map(np.testing.assert_array_equal, limbs.params, plain.params)
    assert plain_metrics.keys() == {"loss/opd", "loss/total", "optim/grad_norm"}
    # A term that may be raised is measured; golden rows without weight are not passed through.
    assert metrics.keys() == plain_metrics.keys() | {"loss/reference_kl"}


def test_plain_opd_equals_ten_lines_of_it():
    def loss(params):
        logits = decoder.forward(params, CONFIG, ROWS.tokens_BT, ROWS.length_B)
        every = jax.nn.log_softmax(logits[:, :-1])
        logprob = jnp.take_along_axis(every, ROWS.tokens_BT[:, 1:, None], axis=-1)[..., 0]
        ratio = jnp.exp(logprob - ROWS.sampler_logprob_BT[:, 1:])
        advantage = ROWS.advantage_BT[:, 1:]
        best = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        mask = ROWS.weight_BT[:, 1:] > 0
        return -jnp.sum(jnp.where(mask, best, 0.0)) / jnp.sum(mask)

    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
    new, metrics = model_update(golden=0.0, beta=0.0, limbs=False)(
        sgd_state(), Frozen(), ROWS, None
    )
    np.testing.assert_allclose(metrics["loss/total"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["optim/grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert distance(moved(new.params), jax.tree.map(lambda g: -0.1 * g, gradient)) < 1e-5
    assert new.step == 1


def test_a_non_finite_gradient_leaves_the_state_untouched():
    tx = OPTIMIZERS["adamw"]
    step = toy_update(tx)
    state, _ = step(update.init_state(fresh(TOY_PARAMS), tx), Frozen(), ROWS, GOLDEN)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    spoilt = ROWS.replace(advantage_BT=ROWS.advantage_BT.at[1, 3].set(jnp.nan))
    state, metrics = step(state, Frozen(), spoilt, GOLDEN)
    assert not np.isfinite(metrics["optim/grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert state.step == update.applied(state) == 1  # the update that was left out does not count
    state, metrics = step(state, Frozen(), ROWS, GOLDEN)  # and it goes on from there
    assert state.step == update.applied(state) == 2
    assert np.isfinite(metrics["optim/grad_norm"])
    assert distance(state.params, before[0]) > 1e-5


def test_a_nan_advantage_reaches_the_gradient_norm_of_the_model():
    spoilt = ROWS.replace(advantage_BT=ROWS.advantage_BT.at[1, 3].set(jnp.nan))
    new, metrics = model_update(golden=0.0, beta=0.0, limbs=False)(
        sgd_state(), Frozen(), spoilt, None
    )
    assert ROWS.weight_BT[1, 3] > 0
    assert not np.isfinite(metrics["optim/grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, new.params, PARAMS)


def test_three_updates_trace_once():
    traces = []

    def counted(params, reference, rows, weights):
        traces.append(rows)
        return toy_rollout_loss(params, reference, rows, weights)

    step = make_step(optax.sgd(0.1), counted, None, tokens=2 * T)
    state, counts = update.init_state(fresh(TOY_PARAMS), optax.sgd(0.1)), []
    for _ in range(3):
        state, _ = step(state, Frozen(), ROWS, None)
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3
    assert state.step == 3


def test_other_weights_trace_nothing_anew_and_weigh_the_terms():
    traces = []

    def two_terms(params, reference, rows, weights):
        traces.append(rows)
        _, parts = toy_rollout_loss(params, reference, rows, weights)
        return weighted(parts | {"reference_kl": jnp.sum(params["dense"]["bias"] ** 2)}, weights)

    accumulate = update.make_accumulate(
        two_terms, toy_golden_loss, microbatch_tokens=B * T, dtype=jnp.float32
    )

    def gradient(**weights: float):
        given = dict.fromkeys(ONES, 0.0) | weights
        return accumulate(TOY_PARAMS, Frozen(), ROWS, GOLDEN, given)

    alone = {name: gradient(**{name: 1.0})[0] for name in ("opd", "reference_kl", "sft")}
    count = len(traces)
    mixed, sums = gradient(opd=0.5, reference_kl=2.0, sft=0.25)
    expected = jax.tree.map(
        lambda a, b, c: 0.5 * a + 2.0 * b + 0.25 * c,
        alone["opd"], alone["reference_kl"], alone["sft"],
    )  # fmt: skip
    assert distance(mixed, expected) < 1e-6
    total = 0.5 * sums["opd"] + 2.0 * sums["reference_kl"] + 0.25 * sums["sft"]
    np.testing.assert_allclose(sums["total"], total, rtol=1e-6)
    assert len(traces) == count


def test_term_gradients_by_hand():
    """Gradients (3, 4) and, weighted by 2, (8, -6): norms 5 and 10, at right angles; (6, 8): parallel."""
    params = {"w": jnp.zeros((1, 2))}
    rows = RolloutRows(*(np.ones((1, 2), np.float32) for _ in range(5))).replace(
        tokens_BT=np.zeros((1, 2), np.int32), length_B=np.array([2])
    )
    golden = GoldenRows(rows.tokens_BT, rows.length_B, rows.weight_BT)

    def on_rollouts(params, frozen, rows, weights):
        x, y = params["w"][0]
        parts = {"opd": 3.0 * x + 4.0 * y, "reference_kl": 4.0 * x - 3.0 * y}
        return weighted(parts, weights)

    def on_golden(params, frozen, rows, weights):
        x, y = params["w"][0]
        return weighted({"sft": 6.0 * x + 8.0 * y}, weights)

    accumulate = update.make_accumulate(
        on_rollouts, on_golden, microbatch_tokens=2, dtype=jnp.float32
    )
    weights = {
        "opd": 1.0,
        "divergence": 0.0,
        "reference_kl": 2.0,
        "sft": 0.5,
        "golden_divergence": 0.0,
    }
    got = update.term_gradients(accumulate, params, Frozen(), rows, golden, weights)
    expected = {
        "optim/grad_norm_opd": 5.0,
        "optim/grad_norm_reference_kl": 10.0,
        "optim/grad_norm_sft": 5.0,
        "optim/grad_cosine_opd_reference_kl": 0.0,
        "optim/grad_cosine_opd_sft": 1.0,
        "optim/grad_cosine_reference_kl_sft": 0.0,
    }
    assert {k: float(v) for k, v in got.items()} == pytest.approx(expected, abs=1e-6)
    alone = weights | {"reference_kl": 0.0, "sft": 0.0}
    assert update.term_gradients(accumulate, params, Frozen(), rows, golden, alone) == {}


def test_the_state_is_donated():
    tx = OPTIMIZERS["adamw"]
    state = update.init_state(fresh(TOY_PARAMS), tx)
    toy_update(tx)(state, Frozen(), ROWS, GOLDEN)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_the_state_takes_over_float32_parameters_without_a_copy():
    params = fresh(TOY_PARAMS)
    state = update.init_state(params, OPTIMIZERS["sgd"], average=True)
    assert state.params["dense"]["kernel"] is params["dense"]["kernel"]
    assert state.average["dense"]["kernel"] is not params["dense"]["kernel"]


def test_the_moving_average_by_hand():
    """From 1, weights w1 and w2: 0.9 * 1 + 0.1 * w1, then 0.9 of that + 0.1 * w2."""
    tx = optax.sgd(0.1)
    step = make_step(tx, toy_rollout_loss, None, tokens=B * T, decay=0.9)
    state = update.init_state(fresh(TOY_PARAMS), tx, average=True)
    expected = np.asarray(TOY_PARAMS["dense"]["bias"])
    for _ in range(2):
        state, _ = step(state, Frozen(), ROWS, None)
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["dense"]["bias"])
    np.testing.assert_allclose(state.average["dense"]["bias"], expected, rtol=1e-6)
    assert np.abs(expected - np.asarray(state.params["dense"]["bias"])).max() > 1e-4


def test_a_copy_every_so_many_applied_updates():
    """Weights 0 0 2 2 4 at updates 1 to 4; an update that is skipped neither counts nor copies."""
    tx = optax.sgd(0.1)
    accumulate = update.make_accumulate(
        toy_rollout_loss, None, microbatch_tokens=B * T, dtype=jnp.float32
    )
    step = update.make_update(tx, accumulate, every=2)
    state = update.init_state(fresh(TOY_PARAMS), tx, average=True)
    copies = [np.asarray(TOY_PARAMS["dense"]["bias"])]
    spoilt = ROWS.replace(advantage_BT=np.full_like(ROWS.advantage_BT, np.nan))
    for number in range(1, 5):
        if number == 2:
            state, metrics = step(state, Frozen(), spoilt, None, ONES)
            assert not np.isfinite(metrics["loss/total"])
            np.testing.assert_array_equal(state.average["dense"]["bias"], copies[-1])
        state, _ = step(state, Frozen(), ROWS, None, ONES)
        if number % 2 == 0:
            copies.append(np.asarray(state.params["dense"]["bias"]))
        np.testing.assert_array_equal(state.average["dense"]["bias"], copies[-1])
    assert int(state.step) == 4
    assert len(copies) == 3
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(copies))


def test_bfloat16_compute_keeps_float32_masters():
    seen = set()

    def watched(params, reference, rows, weights):
        seen.update(w.dtype for w in jax.tree.leaves(params))
        return toy_rollout_loss(params, reference, rows, weights)

    tx = optax.sgd(1e-4)
    step = make_step(tx, watched, None, tokens=2 * T, dtype=jnp.bfloat16)
    halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), TOY_PARAMS)
    state, metrics = step(update.init_state(fresh(halves), tx), Frozen(), ROWS, None)
    assert seen == {jnp.dtype(jnp.bfloat16)}
    assert {w.dtype for w in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert metrics["optim/grad_norm"].dtype == jnp.float32
    change = state.params["dense"]["bias"] - 1.0  # bfloat16 next to 1 counts in steps of 2^-8
    assert 0 < np.max(np.abs(change)) < 2**-9
    exact, _ = toy_update(optax.sgd(1e-4))(
        update.init_state(fresh(halves), tx), Frozen(), ROWS, jax.tree.map(jnp.zeros_like, GOLDEN)
    )
    assert distance(change, exact.params["dense"]["bias"] - 1.0) < 0.02


@pytest.mark.slow
def test_in_bfloat16_the_gradients_of_embedding_and_head_add_up_in_float32():
    """600 times the same token: summed in bfloat16, 1 + 1 + ... gets no further than 256."""
    config = tiny_config(num_layers=1, tie_embeddings=False, max_position=600)
    params = random_params(config, seed=3)
    terms = default_terms(pg_weight=0.0, lambda_gold=1.0)
    loss = objective.make_golden_loss(terms, config, token_chunk=1, remat="none")
    rows = GoldenRows(
        np.full((1, 600), 7, np.int32), np.array([600], np.int32), np.ones((1, 600), np.float32)
    )
    gradients = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        add = update.make_add(loss, dtype)
        zeros = jax.tree.map(jnp.zeros_like, params)
        _, _, gradients[dtype] = add(params, Frozen(), rows, {"sft": 1.0}, zeros)
    rough, exact = gradients[jnp.bfloat16], gradients[jnp.float32]
    assert distance(rough["head"]["kernel"], exact["head"]["kernel"]) < 0.02
    assert distance(rough["embed"]["embedding"], exact["embed"]["embedding"]) < 0.02
