"""The sampler's distribution against exact probabilities, and the nucleus against sorting."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from opd_jax.models.end_tokens import Events
from opd_jax.rollout import sampling as sampler
from opd_jax.rollout.sampling import SamplingParams, draw_noise, most_likely, nucleus

LOGITS = np.array([1.5, -0.5, 0.0, 2.0, -2.0, 0.5, 1.0], np.float32)


def sample(logits_BV, keys, sampling):
    """The sampler, given a key per row."""
    return sampler.sample(logits_BV, draw_noise(keys, logits_BV.shape[-1]), sampling)


def draw(logits_BV, seed: int = 0, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0):
    """(tokens, logprobs) with one key a row."""
    keys = jax.random.split(jax.random.key(seed), len(logits_BV))
    token, logprob = _sampled(jnp.asarray(logits_BV), keys, temperature, top_p, top_k)
    return np.asarray(token), np.asarray(logprob)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sampled(logits_BV, keys, temperature: float, top_p: float, top_k: int):
    sampling = SamplingParams(1, temperature=temperature, top_p=top_p, top_k=top_k)
    return sample(logits_BV, keys, sampling)


def sorted_nucleus(logits_V: np.ndarray, top_p: float) -> np.ndarray:
    """Which ids stay: sort, add up to top_p, keep ties of the last one. float64."""
    prob = scipy.special.softmax(logits_V.astype(np.float64))
    order = np.argsort(-prob)
    last = order[np.argmax(np.cumsum(prob[order]) >= top_p)]
    return prob >= prob[last]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.7, 0.8)])
def test_draws_follow_the_exact_distribution(temperature, top_p):
    prob = scipy.special.softmax(LOGITS.astype(np.float64) / temperature)
    prob = np.where(sorted_nucleus(LOGITS / temperature, top_p), prob, 0.0)
    expected = 20_000 * prob / prob.sum()
    token, _ = draw(np.tile(LOGITS, (20_000, 1)), temperature=temperature, top_p=top_p)
    count = np.bincount(token, minlength=len(LOGITS))
    possible = expected > 0
    assert count[~possible].sum() == 0
    chi2 = np.sum((count - expected)[possible] ** 2 / expected[possible])
    assert chi2 < scipy.stats.chi2.isf(1e-3, df=possible.sum() - 1)


def test_draws_from_the_top_k_and_then_its_nucleus_follow_the_exact_distribution():
    """The three likeliest are ids 3, 0, 6 with 0.506, 0.307, 0.186 of their mass: 0.8 keeps two."""
    for top_p, stay in ((1.0, [3, 0, 6]), (0.8, [3, 0])):
        token, logprob = draw(np.tile(LOGITS, (20_000, 1)), top_k=3, top_p=top_p)
        count = np.bincount(token, minlength=len(LOGITS))[stay]
        assert count.sum() == 20_000
        expected = 20_000 * scipy.special.softmax(LOGITS[stay].astype(np.float64))
        chi2 = np.sum((count - expected) ** 2 / expected)
        assert chi2 < scipy.stats.chi2.isf(1e-3, df=len(stay) - 1)
        want = scipy.special.log_softmax(LOGITS.astype(np.float64))[token]  # the model's own
        np.testing.assert_allclose(logprob, want, atol=1e-6)


@pytest.mark.parametrize("k", [1, 16, 17, 40, 101, 1000])
def test_the_most_likely_equal_sorting(k):
    """More than 16 take several rounds; as many as there are ids, or more, cut nothing."""
    logits = np.random.default_rng(0).standard_normal((30, 101)).astype(np.float32)
    last = np.sort(logits, axis=-1)[:, ::-1][:, min(k, 101) - 1]
    want = logits >= last[:, None]
    if k < 101:
        kept = np.asarray(most_likely(jnp.asarray(logits), k)) > -np.inf
        np.testing.assert_array_equal(kept, want)
    token, _ = draw(logits, top_k=k)
    assert want[np.arange(30), token].all()
    if k == 1:
        np.testing.assert_array_equal(token, logits.argmax(-1))


def test_the_most_likely_keep_ties():
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    stay = most_likely(logits, 2)[0] > -jnp.inf
    np.testing.assert_array_equal(stay, [False, True, True, True, True, False])


@pytest.mark.slow
def test_draws_over_several_blocks_of_the_vocabulary_follow_the_exact_distribution():
    """Ids 300, in blocks of 16, the last not full, one block without any mass, one with a peak."""
    logits = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    logits[32:48], logits[48:64], logits[299] = -np.inf, -1e30, 5.0
    expected = 100_000 * scipy.special.softmax(logits.astype(np.float64))
    token, logprob = draw(np.tile(logits, (100_000, 1)))
    count = np.bincount(token, minlength=300)
    possible = expected > 0
    assert possible.sum() == 268
    assert count[~possible].sum() == 0
    chi2 = np.sum((count - expected)[possible] ** 2 / expected[possible])
    assert chi2 < scipy.stats.chi2.isf(1e-3, df=267)
    want = scipy.special.log_softmax(logits.astype(np.float64))[token]
    np.testing.assert_allclose(logprob, want, atol=1e-5)


def test_a_draw_depends_on_its_key_alone():
    logits = np.random.default_rng(0).standard_normal((6, 30))
    keys = jax.random.split(jax.random.key(3), 6)
    sampling = SamplingParams(1, top_p=0.9)
    drawn = jax.jit(lambda logits, keys: sample(logits, keys, sampling)[0])
    together = drawn(jnp.asarray(logits), keys)
    alone = [drawn(jnp.asarray(logits[i : i + 1]), keys[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_nucleus_equals_sorting(scale, top_p):
    logits = (scale * np.random.default_rng(0).standard_normal((40, 101))).astype(np.float32)
    want = np.stack([sorted_nucleus(row, top_p) for row in logits])
    got = np.asarray(nucleus(jnp.asarray(logits), top_p))
    np.testing.assert_array_equal(got > -np.inf, want)
    np.testing.assert_array_equal(got[want], logits[want])


@pytest.mark.parametrize(
    ("weights", "top_p", "stay"),
    [
        ([4, 2, 2, 1], 0.5, [True, True, True, False]),  # one of the two would do: both stay
        ([4, 2, 2, 1], 0.4, [True, False, False, False]),
        ([3, 3, 3, 3], 0.3, [True, True, True, True]),
        ([5, 5, 1, 1], 0.6, [True, True, False, False]),
        ([1, 1, 6, 2], 0.7, [False, False, True, True]),
    ],
)
def test_nucleus_keeps_ties(weights, top_p, stay):
    logits = jnp.log(jnp.array([weights], jnp.float32))
    np.testing.assert_array_equal(nucleus(logits, top_p)[0] > -jnp.inf, stay)


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1e-9, 1e-3])
def test_a_tiny_nucleus_is_the_top_token(top_p):
    logits = np.random.default_rng(0).standard_normal((50, 101)).astype(np.float32)
    kept = np.asarray(nucleus(jnp.asarray(logits), top_p)) > -np.inf
    np.testing.assert_array_equal(kept, np.arange(101)[None] == logits.argmax(-1)[:, None])
    np.testing.assert_array_equal(draw(logits, top_p=top_p)[0], logits.argmax(-1))


def test_a_nucleus_holds_its_top_token_among_nearly_equal_ones():
    logits = jnp.zeros((1, 1000)).at[0, 17].set(1e-4)
    assert np.flatnonzero(nucleus(logits, 1e-4)[0] > -jnp.inf).tolist() == [17]


def test_temperature_zero_is_argmax():
    logits = np.random.default_rng(0).standard_normal((50, 31)).astype(np.float32)
    np.testing.assert_array_equal(draw(logits, temperature=0.0)[0], logits.argmax(-1))
    np.testing.assert_array_equal(draw(logits, temperature=0.0, top_p=0.5)[0], logits.argmax(-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.7), (2.0, 1.0), (0.0, 1.0)])
def test_logprob_is_that_of_the_model_whatever_the_settings(temperature, top_p):
    logits = (3 * np.random.default_rng(0).standard_normal((50, 31))).astype(np.float32)
    token, logprob = draw(logits, temperature=temperature, top_p=top_p)
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)[np.arange(50), token]
    np.testing.assert_allclose(logprob, want, atol=1e-6)


def test_only_allowed_ids_are_drawn_and_logprobs_are_over_the_scored_ones():
    """Ids 0 and 3 are never drawn; id 6 is drawn, but stands outside the scored distribution."""
    drawn_V = np.array([0, 1, 1, 0, 1, 1, 1], bool)
    scored_V = np.array([0, 1, 1, 0, 1, 1, 0], bool)
    keys = jax.random.split(jax.random.key(0), 20_000)
    sampling = SamplingParams(1, drawn_V=drawn_V, events=Events(scored_V=scored_V))
    token, logprob = sample(jnp.tile(LOGITS, (20_000, 1)), keys, sampling)
    prob = np.where(drawn_V, scipy.special.softmax(LOGITS.astype(np.float64)), 0.0)
    expected = 20_000 * prob[drawn_V] / prob.sum()
    count = np.bincount(np.asarray(token), minlength=7)
    assert count[~drawn_V].sum() == 0
    chi2 = np.sum((count[drawn_V] - expected) ** 2 / expected)
    assert chi2 < scipy.stats.chi2.isf(1e-3, df=4)
    log_p = LOGITS - scipy.special.logsumexp(LOGITS[scored_V])
    want = np.where(scored_V, log_p, 0.0)[np.asarray(token)]
    np.testing.assert_allclose(logprob, want, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_logits_give_float32_logprobs(strict_dtypes):
    logits = jnp.asarray(np.tile(LOGITS, (4, 1)), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 4)
    token, logprob = sample(logits, keys, SamplingParams(1, temperature=0.7, top_p=0.9))
    assert (token.dtype, logprob.dtype) == (jnp.int32, jnp.float32)
    want = scipy.special.log_softmax(LOGITS.astype(np.float64))[np.asarray(token)]
    np.testing.assert_allclose(logprob, want, atol=1e-6)  # LOGITS are exact in bfloat16
