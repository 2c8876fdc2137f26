"""The losses of a run against the same sums written directly over whole logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses, scoring
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.training import objective
from opd_jax.training.terms import default_terms
from opd_jax.types import Frozen, GoldenRows, RolloutRows, TeacherRows
from tests.conftest import distance, random_params, random_rows, tiny_config
from tests.support import calls
from tests.support.lanes import slow

CONFIG = tiny_config(num_layers=2)
VOCABULARY = CONFIG.vocab_size
TERMS = default_terms(pg_weight=0.7, jsd_beta=0.25, lambda_gold=0.3, beta_kl=0.2, clip_high=0.3)
SHARED = {"token_chunk": 7, "remat": "none"}  # 4 rows of 10 tokens: the last chunk is not full
STUDENT, REFERENCE = random_params(CONFIG, seed=0), random_params(CONFIG, seed=1)


def weighted(loss, terms):
    """(sum of the weighted terms, the terms), as the update takes it."""

    return lambda params, *rest: loss(params, *rest, terms.weights)


@functools.cache
def rollout_loss(estimator: str = "full", vocabulary: int = VOCABULARY):
    """((total, parts), gradient) of (params, reference, rows), jitted once for all tests."""
    terms = dataclasses.replace(TERMS, kl_estimator=estimator)
    loss = objective.make_rollout_loss(terms, CONFIG, CONFIG, events=Events(vocabulary), **SHARED)
    made = jax.jit(jax.value_and_grad(weighted(loss, terms), has_aux=True))
    return lambda params, reference, rows: made(params, Frozen(reference=reference), rows)


def token_logprobs(params, rows, vocabulary: int = VOCABULARY) -> tuple[jax.Array, jax.Array]:
    """Of token t >= 1 given what stands before it, [B, T-1]; and of every id, [B, T-1, V]."""
    logits = decoder.forward(params, CONFIG, rows.tokens_BT, rows.length_B)[:, :-1, :vocabulary]
    every = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    token = rows.tokens_BT[:, 1:, None]
    return jnp.take_along_axis(every, token, axis=-1)[..., 0], every


def direct_rollout_loss(params, reference, rows, estimator_weights, vocabulary: int = VOCABULARY):
    """TERMS written out; `estimator_weights` says which of full, k1, k2, k3 is the KL."""
    logprob, every = token_logprobs(params, rows, vocabulary)
    reference_logprob, reference_every = token_logprobs(reference, rows, vocabulary)
    ratio = jnp.exp(logprob - rows.sampler_logprob_BT[:, 1:])
    advantage = rows.advantage_BT[:, 1:]
    opd = -jnp.where(
        advantage > 0, jnp.minimum(ratio, 1.3) * advantage, jnp.maximum(ratio, 0.8) * advantage
    )
    d = logprob - reference_logprob
    full = jnp.sum(jnp.exp(every) * (every - reference_every), axis=-1)
    kls = (full, d, d * d / 2, jnp.exp(-d) - 1 + d)
    kl = sum(w * x for w, x in zip(estimator_weights, kls, strict=True))
    weight = rows.weight_BT[:, 1:]
    return 0.7 * jnp.sum(weight * opd) + 0.2 * jnp.sum(weight * kl)


direct_value_and_grad = jax.jit(
    jax.value_and_grad(direct_rollout_loss), static_argnames="vocabulary"
)


def make_rows(seed: int = 0) -> RolloutRows:
    """4 rows whose tokens from 3 on weigh something; sampler log-probs on both sides of the clip."""
    tokens_BT, length_B = random_rows(CONFIG, 4, 10, seed)
    generator = np.random.default_rng(seed)
    position = np.arange(10)[None]
    response = (position >= 3) & (position < np.asarray(length_B)[:, None])
    weight = np.where(response, generator.uniform(0.5, 1.5, (4, 10)), 0.0)
    logprob_BT = scoring.token_logprob(STUDENT, CONFIG, tokens_BT, length_B)
    return RolloutRows(
        tokens_BT=tokens_BT,
        length_B=length_B,
        weight_BT=jnp.asarray(weight / weight.sum(), jnp.float32),
        advantage_BT=jnp.asarray(generator.normal(size=(4, 10)), jnp.float32),
        sampler_logprob_BT=logprob_BT + jnp.asarray(generator.normal(0, 0.3, (4, 10)), jnp.float32),
    )


@pytest.fixture(scope="module")
def rows() -> RolloutRows:
    return make_rows()


def largest(tree) -> float:
    return max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("place", "estimator"), [(0, "full"), *slow(*list(enumerate(losses.ESTIMATORS))[1:])]
)
def test_rollout_loss_equals_the_direct_sum(rows, place, estimator):
    (total, parts), gradient = rollout_loss(estimator)(STUDENT, REFERENCE, rows)
    expected, expected_gradient = direct_value_and_grad(
        STUDENT, REFERENCE, rows, tuple(jnp.float32(i == place) for i in range(4))
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(total, 0.7 * parts["opd"] + 0.2 * parts["reference_kl"], rtol=1e-6)
    assert distance(gradient, expected_gradient) < 1e-5
    assert largest(gradient) > 1e-2


def test_rollout_loss_in_float64(rows):
    """The value once more in numpy, from the logits on."""
    forward = jax.jit(decoder.forward, static_argnums=1)
    logits, reference = (
        np.asarray(forward(params, CONFIG, rows.tokens_BT, rows.length_B), np.float64)
        for params in (STUDENT, REFERENCE)
    )
    log_p, log_ref = (
        x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)) for x in (logits, reference)
    )
    opd = kl = 0.0
    for b in range(4):
        for t in range(1, 10):
            weight = float(rows.weight_BT[b, t])
            logprob = log_p[b, t - 1, rows.tokens_BT[b, t]]
            ratio = np.exp(logprob - float(rows.sampler_logprob_BT[b, t]))
            advantage = float(rows.advantage_BT[b, t])
            opd -= weight * min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
            kl += weight * np.sum(np.exp(log_p[b, t - 1]) * (log_p[b, t - 1] - log_ref[b, t - 1]))
    (total, parts), _ = rollout_loss()(STUDENT, REFERENCE, rows)
    np.testing.assert_allclose(parts["opd"], opd, rtol=1e-5)
    np.testing.assert_allclose(parts["reference_kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(total, 0.7 * opd + 0.2 * kl, rtol=1e-5)


@pytest.mark.slow
def test_a_teacher_equal_to_the_student_teaches_nothing(rows):
    scores = calls.score(
        STUDENT, CONFIG, STUDENT, CONFIG, rows.tokens_BT, rows.length_B,
        vocabulary=VOCABULARY, top_k=2, token_chunk=7, microbatch_tokens=40,
    )  # fmt: skip
    advantage_BT = losses.opd_advantage(
        teacher_logprob_BT=scores.teacher_logprob_BT, student_logprob_BT=scores.student_logprob_BT
    )
    np.testing.assert_array_equal(advantage_BT, 0.0)
    rows = rows.replace(advantage_BT=advantage_BT, sampler_logprob_BT=scores.student_logprob_BT)
    terms = dataclasses.replace(TERMS, beta_kl=0.0)
    loss = objective.make_rollout_loss(terms, CONFIG, **SHARED)
    (total, parts), gradient = jax.jit(jax.value_and_grad(weighted(loss, terms), has_aux=True))(
        STUDENT, Frozen(), rows
    )
    assert parts.keys() == {"opd"}  # no reference, no KL
    assert total == 0.0
    assert largest(gradient) < 1e-7


@pytest.mark.parametrize("estimator", ["full", *slow(*losses.ESTIMATORS[1:])])
def test_a_reference_equal_to_the_student_does_not_pull(rows, estimator):
    rows = rows.replace(advantage_BT=jnp.zeros_like(rows.advantage_BT))
    (_, parts), gradient = rollout_loss(estimator)(STUDENT, STUDENT, rows)
    # The compiler may round the two passes differently: only one of them is differentiated.
    np.testing.assert_allclose(parts["reference_kl"], 0.0, atol=1e-6)
    if estimator == "k1":  # only its expectation has no gradient: k1 measures, it does not pull
        assert largest(gradient) > 1e-2
    else:
        assert largest(gradient) < 1e-6


@pytest.mark.parametrize("anything", [np.nan, np.inf, -np.inf])
def test_tokens_without_weight_may_hold_anything(rows, anything):
    spoilt = rows.replace(
        advantage_BT=jnp.where(rows.weight_BT > 0, rows.advantage_BT, anything),
        sampler_logprob_BT=jnp.where(rows.weight_BT > 0, rows.sampler_logprob_BT, anything),
    )
    (total, _), gradient = rollout_loss()(STUDENT, REFERENCE, rows)
    (spoilt_total, _), spoilt_gradient = rollout_loss()(STUDENT, REFERENCE, spoilt)
    assert spoilt_total == total
    assert distance(spoilt_gradient, gradient) < 1e-7


def test_a_row_without_weight_adds_nothing(rows):
    (total, _), gradient = rollout_loss()(STUDENT, REFERENCE, rows)
    empty = jax.tree.map(jnp.zeros_like, rows)
    (nothing, _), zero = rollout_loss()(STUDENT, REFERENCE, empty)
    assert nothing == 0.0
    assert largest(zero) == 0.0
    halves = [  # rows 0, 1 and rows 2, 3, each beside two empty rows
        jax.tree.map(
            lambda x, keep=keep: jnp.where(jnp.expand_dims(keep, range(1, x.ndim)), x, 0), rows
        )
        for keep in (jnp.arange(4) < 2, jnp.arange(4) >= 2)
    ]
    parts = [rollout_loss()(STUDENT, REFERENCE, half) for half in halves]
    np.testing.assert_allclose(parts[0][0][0] + parts[1][0][0], total, rtol=1e-5)
    assert distance(jax.tree.map(jnp.add, parts[0][1], parts[1][1]), gradient) < 1e-5


@pytest.mark.slow
def test_vocabulary_cut(rows):
    rows = rows.replace(tokens_BT=jnp.minimum(rows.tokens_BT, 89))
    (total, _), gradient = rollout_loss("full", 90)(STUDENT, REFERENCE, rows)
    weights = tuple(jnp.float32(i == 0) for i in range(4))
    expected, expected_gradient = direct_value_and_grad(
        STUDENT, REFERENCE, rows, weights, vocabulary=90
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert distance(gradient, expected_gradient) < 1e-5
    # Ids beyond the cut are never scored: as outputs they get no gradient, and as inputs none here.
    np.testing.assert_array_equal(gradient["embed"]["embedding"][90:], 0.0)
    assert abs(float(rollout_loss()(STUDENT, REFERENCE, rows)[0][0]) - float(total)) > 1e-3


def test_golden_loss_equals_the_direct_sum(rows):
    golden = GoldenRows(rows.tokens_BT, rows.length_B, rows.weight_BT)

    def direct(params):
        return -0.3 * jnp.sum(golden.weight_BT[:, 1:] * token_logprobs(params, golden)[0])

    loss = objective.make_golden_loss(TERMS, CONFIG, token_chunk=7, remat="full")
    (total, parts), gradient = jax.jit(jax.value_and_grad(weighted(loss, TERMS), has_aux=True))(
        STUDENT, Frozen(), golden
    )
    expected, expected_gradient = jax.jit(jax.value_and_grad(direct))(STUDENT)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(total, 0.3 * parts["sft"], rtol=1e-6)
    assert distance(gradient, expected_gradient) < 1e-5


def direct_divergence(params, teacher, rows, teacher_tokens, offset, direction):
    """D(student, teacher) over whole logits, the teacher's read at t + offset of its own rows."""
    p = token_logprobs(params, rows)[1]
    length = rows.length_B + offset
    logits = jax.nn.log_softmax(calls.forward(teacher, CONFIG, teacher_tokens, length))
    at = jnp.arange(9)[None] + offset[:, None]
    q = jnp.take_along_axis(logits, at[:, :, None], axis=1)
    return jnp.sum(rows.weight_BT[:, 1:] * jnp.sum(integrand(p, q, direction), axis=-1))


def integrand(p, q, direction):
    """What a divergence sums over ids, from log-probs; b = 0.25, a = 0.1, equal shares of the mixture."""
    m = jnp.log(0.25 * jnp.exp(q) + 0.75 * jnp.exp(p))
    return {
        "reverse": jnp.exp(p) * (p - q),
        "forward": jnp.exp(q) * (q - p),
        "jsd": 0.25 * jnp.exp(q) * (q - m) + 0.75 * jnp.exp(p) * (p - m),
        "skewed_reverse": jnp.exp(p) * (p - jnp.log(0.9 * jnp.exp(q) + 0.1 * jnp.exp(p))),
        "skewed_forward": jnp.exp(q) * (q - jnp.log(0.9 * jnp.exp(p) + 0.1 * jnp.exp(q))),
        "mixture": 0.5 * (jnp.exp(p) - jnp.exp(q)) * (p - q),
    }[direction]


@pytest.mark.parametrize("direction", slow(*losses.DIRECTIONS))
def test_divergence_equals_the_direct_sum_behind_a_prompt_of_the_teachers_own(rows, direction):
    """The teacher's rows begin with two tokens more."""
    tokens = np.concatenate([np.full((4, 2), 5), np.asarray(rows.tokens_BT)], axis=1)
    offset = np.full(4, 2, np.int32)
    own = TeacherRows(tokens_BT=tokens, length_B=rows.length_B + 2, offset_B=offset)
    terms = dataclasses.replace(
        TERMS, pg_weight=0.0, beta_kl=0.0, divergence_weight=0.6, direction=direction
    )
    scores = calls.score(
        STUDENT, CONFIG, REFERENCE, CONFIG, rows.tokens_BT, rows.length_B, teacher_rows=own,
        keep_hidden=True, vocabulary=VOCABULARY, top_k=2, token_chunk=7, microbatch_tokens=40,
    )  # fmt: skip
    loss = objective.make_rollout_loss(terms, CONFIG, **SHARED)
    (total, parts), gradient = jax.jit(jax.value_and_grad(weighted(loss, terms), has_aux=True))(
        STUDENT,
        Frozen(teacher=decoder.head_alone(REFERENCE)),
        rows.replace(teacher_hidden_BTD=scores.teacher_hidden_BTD),
    )
    expected, expected_gradient = jax.jit(
        jax.value_and_grad(direct_divergence), static_argnames="direction"
    )(STUDENT, REFERENCE, rows, jnp.asarray(tokens), jnp.asarray(offset), direction=direction)
    np.testing.assert_allclose(parts["divergence"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, 0.6 * expected, rtol=1e-5)
    assert distance(gradient, jax.tree.map(lambda g: 0.6 * g, expected_gradient)) < 1e-5
    assert largest(gradient) > 1e-2


def test_needs_rollouts():
    supervised = dataclasses.replace(TERMS, pg_weight=0.0, beta_kl=0.0)
    assert dataclasses.replace(supervised, divergence_weight=1.0).needs_teacher
    assert not supervised.needs_rollouts
    assert dataclasses.replace(supervised, pg_weight=1.0).needs_rollouts
    assert dataclasses.replace(supervised, beta_kl=0.1).needs_rollouts
