"""Chunks of tokens: only those with a token that counts are computed; sums and gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import scoring
from opd_jax.scoring import chunked

VOCABULARY, WIDTH = 5, 4  # ids, features
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 6)).astype(np.int32)
HIDDEN = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6, WIDTH)), jnp.float32)
HEAD = jnp.asarray(np.random.default_rng(2).standard_normal((VOCABULARY, WIDTH)), jnp.float32)


def test_tokens_that_count_come_first_and_position_0_never_does():
    counts = np.zeros((3, 6), bool)
    counts[0, 0] = counts[0, 4] = counts[2, 1] = counts[2, 5] = True
    index, chunks = chunked._packed(jnp.asarray(TOKENS), jnp.asarray(counts), 2)
    assert index.shape == (9, 2)
    assert chunks == 2  # 3 tokens, 2 to a chunk
    assert index.reshape(-1)[:3].tolist() == [4, 13, 17]
    rest = index.reshape(-1)[3:]
    assert (rest >= TOKENS.size).all()
    assert len(set(rest.tolist())) == len(rest)


@pytest.mark.parametrize(
    ("counted", "chunks"), [((), 0), ((7,), 1), ((7, 8, 10), 1), (range(7, 12), 2)]
)
def test_a_chunk_without_a_token_that_counts_is_not_computed(counted, chunks):
    calls = []

    def fn(logprob_CV, token_C):
        jax.debug.callback(lambda: calls.append(1))
        return {"nll": -scoring.take(logprob_CV, token_C)}

    counts = np.isin(np.arange(18).reshape(3, 6), counted)
    readouts = [scoring.Readout(HEAD, HIDDEN)]
    out = scoring.map_tokens(
        fn, readouts, jnp.asarray(TOKENS), counts_BT=jnp.asarray(counts), token_chunk=3
    )
    jax.effects_barrier()
    assert len(calls) == chunks
    assert not np.asarray(out["nll"])[~counts].any()
    assert np.asarray(out["nll"])[counts].all()
    total, sums = scoring.sum_tokens(
        fn, readouts, jnp.asarray(TOKENS), {}, jnp.asarray(counts, jnp.float32), {"nll": 2.0},
        token_chunk=3,
    )  # fmt: skip
    jax.effects_barrier()
    assert len(calls) == 2 * chunks
    np.testing.assert_allclose(sums["nll"], np.asarray(out["nll"]).sum(), rtol=1e-6)
    np.testing.assert_allclose(total, 2.0 * sums["nll"])


@pytest.mark.parametrize("token_chunk", [1, 4, 100])
def test_the_gradient_of_a_weighted_sum_is_that_of_the_written_out_one(token_chunk):
    weight = np.zeros((3, 6), np.float32)
    weight[0, 2:5], weight[1, 1], weight[2, 0] = (
        (0.5, 0.25, 1.0),
        2.0,
        9.0,
    )  # the last is not counted

    def chunked_sum(head, hidden):
        return scoring.sum_tokens(
            lambda p_CV, token_C, extra: {
                "nll": -scoring.take(p_CV, token_C) * extra,
                "entropy": -jnp.sum(jnp.exp(p_CV) * p_CV, axis=-1),
            },
            [scoring.Readout(head, hidden)], jnp.asarray(TOKENS), {"extra": jnp.asarray(weight + 1.0)},
            jnp.asarray(weight), {"nll": 3.0, "entropy": -0.5}, token_chunk=token_chunk,
        )[0]  # fmt: skip

    def direct(head, hidden):
        logprob = jax.nn.log_softmax(hidden[:, :-1] @ head.T)
        taken = jnp.take_along_axis(logprob, TOKENS[:, 1:, None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprob) * logprob, axis=-1)
        w = weight[:, 1:]
        return jnp.sum(w * (-3.0 * taken * (w + 1.0) - 0.5 * entropy))

    got = jax.jit(jax.value_and_grad(lambda *x: 0.7 * chunked_sum(*x), argnums=(0, 1)))(
        HEAD, HIDDEN
    )
    want = jax.jit(jax.value_and_grad(lambda *x: 0.7 * direct(*x), argnums=(0, 1)))(HEAD, HIDDEN)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_values_of_tokens_without_weight_may_be_anything():
    def fn(p_CV, token_C, extra):
        return {"a": scoring.take(p_CV, token_C) * extra}

    weight = np.zeros((3, 6), np.float32)
    weight[1, 2] = 1.0
    extra = np.where(weight > 0, 1.0, np.nan).astype(np.float32)

    def total(hidden):
        return scoring.sum_tokens(
            fn, [scoring.Readout(HEAD, hidden)], jnp.asarray(TOKENS), {"extra": jnp.asarray(extra)},
            jnp.asarray(weight), {"a": 1.0}, token_chunk=4,
        )[0]  # fmt: skip

    value, gradient = jax.jit(jax.value_and_grad(total))(HIDDEN)
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.flatnonzero(np.abs(np.asarray(gradient)).sum(-1).reshape(-1)).tolist() == [7]
