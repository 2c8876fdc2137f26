"""Losses over supports: chunked and scored ahead, against whole logits in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses
from opd_jax.models import decoder
from opd_jax.scoring.topk import SUPPORTS
from opd_jax.training import batch, objective
from opd_jax.training.advantages import Reward, advantages
from opd_jax.training.terms import Terms, default_terms
from opd_jax.types import Frozen, Outcome, Rollout, RolloutRows, Scores
from tests.conftest import distance, random_params, random_rows, tiny_config
from tests.scoring.test_score import sizes
from tests.support import calls
from tests.support.lanes import slow

CONFIG = tiny_config(num_layers=1)
VOCABULARY, K = CONFIG.vocab_size, 5
STUDENT, TEACHER = random_params(CONFIG, seed=0), random_params(CONFIG, seed=1)
TOKENS, LENGTH = random_rows(CONFIG, 4, 10)
PROMPT = 3
TOPK = SUPPORTS[1:]
BESIDE = Frozen(teacher=decoder.head_alone(TEACHER))
TERMS = default_terms(pg_weight=0.0, divergence_weight=1.0, support="teacher", top_k=K)
SAMPLED = Rollout(
    tokens_BT=np.asarray(TOKENS),
    length_B=np.asarray(LENGTH),
    prompt_length_B=np.full(4, PROMPT, np.int32),
    sampler_logprob_BT=np.zeros((4, 10), np.float32),
    outcome_B=np.array([Outcome.EOS, Outcome.BUDGET, Outcome.EOS, Outcome.BUDGET]),
)
MASK = SAMPLED.response_mask_BT
WEIGHT = np.asarray(losses.token_weights(MASK, "token"))


@functools.cache
def scored(support: str | None, k: int = K) -> Scores:
    return calls.score(
        STUDENT, CONFIG, TEACHER, CONFIG, SAMPLED.tokens_BT, SAMPLED.length_B,
        vocabulary=VOCABULARY, top_k=3, token_chunk=7, microbatch_tokens=20,
        support=support and (support, k), keep_hidden=support is None,
    )  # fmt: skip


@functools.cache
def whole(which: str) -> np.ndarray:
    """log p(. | tokens[b, :t]) at [b, t], float64 [B, T, V]; nan at t = 0."""
    params = {"student": STUDENT, "teacher": TEACHER}[which]
    logits = np.asarray(calls.forward(params, CONFIG, TOKENS, LENGTH), np.float64)
    every = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return np.concatenate([np.full((4, 1, VOCABULARY), np.nan), every[:, :-1]], axis=1)


def members(support: str, p: np.ndarray, q: np.ndarray, k: int = K) -> list[int]:
    """The ids of a support, from float64 log-probs of one prefix."""
    a, b = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (p, q))
    sets = {
        "full": set(range(VOCABULARY)), "student": a, "teacher": b, "intersection": a & b,
        "union": a | b, "symmetric_difference": a ^ b,
    }  # fmt: skip
    return sorted(sets[support])


def direct(direction: str, form: str, p: np.ndarray, q: np.ndarray, ids: list[int]) -> float:
    """D of one prefix, term by term in float64; b = 0.25, a = 0.1, a quarter reverse."""
    if not ids and form != "tail":
        return 0.0
    outside = np.setdiff1d(np.arange(VOCABULARY), ids)
    pairs = [(np.exp(p[v]), np.exp(q[v])) for v in ids]
    if form == "renormalised":
        mass_p, mass_q = sum(x for x, _ in pairs), sum(y for _, y in pairs)
        pairs = [(x / mass_p, y / mass_q) for x, y in pairs]
    if form == "teacher_renormalised":
        mass_q = sum(y for _, y in pairs)
        pairs = [(x, y / mass_q) for x, y in pairs]
    if form == "tail" and len(outside):
        pairs.append((np.exp(p[outside]).sum(), np.exp(q[outside]).sum()))
    total = 0.0
    for x, y in pairs:
        m = 0.25 * y + 0.75 * x
        total += {
            "reverse": x * np.log(x / y),
            "forward": y * np.log(y / x),
            "jsd": 0.25 * y * np.log(y / m) + 0.75 * x * np.log(x / m),
            "skewed_reverse": x * np.log(x / (0.9 * y + 0.1 * x)),
            "skewed_forward": y * np.log(y / (0.9 * x + 0.1 * y)),
            "mixture": 0.25 * x * np.log(x / y) + 0.75 * y * np.log(y / x),
        }[direction]
    return total


@pytest.mark.parametrize(
    "support", ["student", *slow(*(name for name in TOPK if name != "student"))]
)
def test_the_scorer_takes_down_the_named_support(support):
    got = scored(support).support
    p, q = whole("student"), whole("teacher")
    for b, t in np.argwhere(MASK):
        ids = got.ids_BTX[b, t]
        there = ids >= 0
        assert sorted(ids[there].tolist()) == members(support, p[b, t], q[b, t])
        np.testing.assert_allclose(got.student_BTX[b, t][there], p[b, t, ids[there]], atol=5e-6)
        np.testing.assert_allclose(got.teacher_BTX[b, t][there], q[b, t, ids[there]], atol=5e-6)
        assert np.isneginf(got.teacher_BTX[b, t][~there]).all()
        outside = np.delete(q[b, t], ids[there])
        np.testing.assert_allclose(
            got.teacher_rest_BT[b, t], np.log(np.exp(outside).sum()), atol=5e-6
        )


@pytest.mark.slow
def test_scores_do_not_depend_on_the_support():
    plain, more = scored(None), scored("union", 20)
    for field in dataclasses.fields(Scores):
        if field.name not in ("support", "teacher_hidden_BTD"):
            np.testing.assert_array_equal(getattr(plain, field.name), getattr(more, field.name))


def loss_of(terms: Terms):
    """jitted (value by name, gradient of the sum) of (params, frozen, rows)."""
    loss = objective.make_rollout_loss(terms, CONFIG, token_chunk=7, remat="none")

    def total(params, frozen, given):
        return loss(params, frozen, given, dict.fromkeys(terms.weights, 1.0))

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def make_rows(terms: Terms, support: str, reward: Reward | None = None) -> RolloutRows:
    scores = scored(None if support == "full" else support)
    advantage = advantages(SAMPLED, scores, MASK, terms, reward=reward)
    return batch.rollout_rows(SAMPLED, scores, MASK, advantage, terms, weigh=lambda _: WEIGHT)


@functools.cache
def every_divergence(support: str):
    """{(direction, form): (value, gradient)} of a support: one compilation for all of them."""
    kinds = [
        (d, f)
        for d in losses.DIRECTIONS
        for f in ([*losses.FORMS[:3], losses.FORMS[4]] if support != "full" else ["raw"])
    ]
    base = dataclasses.replace(TERMS, support=support, jsd_beta=0.25, reverse_share=0.25)
    made = [
        objective.make_rollout_loss(
            dataclasses.replace(base, direction=d, form=f), CONFIG,
            token_chunk=7, remat="none",
        )
        for d, f in kinds
    ]  # fmt: skip

    @jax.jit
    def values(params, frozen, given):
        return [loss(params, frozen, given, base.weights)[1]["divergence"] for loss in made]

    got = values(STUDENT, BESIDE, make_rows(base, support))
    return dict(zip(kinds, got, strict=True))


@pytest.mark.parametrize("support", [*SUPPORTS[:2], *slow(*SUPPORTS[2:])])
def test_chunked_equals_direct_for_every_direction_and_form(support):
    p, q = whole("student"), whole("teacher")
    sets = {(b, t): members(support, p[b, t], q[b, t]) for b, t in np.argwhere(MASK)}
    for (direction, form), value in every_divergence(support).items():
        expected = sum(
            float(WEIGHT[b, t]) * direct(direction, form, p[b, t], q[b, t], ids)
            for (b, t), ids in sets.items()
        )
        assert abs(float(value) - expected) < 1e-6 * max(1.0, abs(expected)), (direction, form)


@pytest.mark.slow
def test_as_many_ids_as_there_are_is_the_whole_vocabulary():
    whole_value = every_divergence("full")[("reverse", "raw")]
    terms = dataclasses.replace(TERMS, support="student", top_k=VOCABULARY)
    for form in losses.FORMS:
        scores = scored("student", VOCABULARY)
        given = batch.rollout_rows(
            SAMPLED, scores, MASK, np.zeros((4, 10), np.float32), terms, weigh=lambda _: WEIGHT
        )
        (value, _), gradient = loss_of(dataclasses.replace(terms, form=form))(
            STUDENT, Frozen(), given
        )
        np.testing.assert_allclose(value, whole_value, atol=2e-6)
        full = dataclasses.replace(TERMS, support="full")
        _, expected = loss_of(full)(STUDENT, BESIDE, make_rows(full, "full"))
        assert distance(gradient, expected) < 1e-5


@pytest.mark.slow
def test_a_teacher_that_is_the_student_teaches_nothing():
    """Renormalised over any support: value and gradient are 0, with the student's own scores."""
    itself = calls.score(
        STUDENT, CONFIG, STUDENT, CONFIG, SAMPLED.tokens_BT, SAMPLED.length_B,
        vocabulary=VOCABULARY, top_k=3, token_chunk=7, microbatch_tokens=40, support=("teacher", K),
    )  # fmt: skip
    terms = dataclasses.replace(TERMS, form="renormalised")
    given = batch.rollout_rows(
        SAMPLED, itself, MASK, np.zeros((4, 10), np.float32), terms, weigh=lambda _: WEIGHT
    )
    (value, _), gradient = loss_of(terms)(STUDENT, Frozen(), given)
    assert abs(float(value)) < 1e-7
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-6


@pytest.mark.parametrize("support", ["student", *slow("symmetric_difference")])
def test_the_published_top_k_surrogate(support):
    """Value and gradient of -sum_v w(v) (log q - log p)[fixed] rho(v) over whole logits."""
    terms = default_terms(
        pg_weight=1.0, teacher_coef=0.5, advantage="support", support=support, top_k=K
    )
    given = make_rows(terms, support)
    (value, _), gradient = loss_of(terms)(STUDENT, Frozen(), given)

    p, q = whole("student"), whole("teacher")
    pull = np.zeros((4, 10, VOCABULARY))
    for b, t in np.argwhere(MASK):
        ids = members(support, p[b, t], q[b, t])
        w = np.exp(p[b, t, ids])
        w = w if support == "symmetric_difference" else w / w.sum()
        pull[b, t, ids] = WEIGHT[b, t] * 0.5 * w * (q[b, t, ids] - p[b, t, ids])

    def written_out(params):
        every = jax.nn.log_softmax(decoder.forward(params, CONFIG, TOKENS, LENGTH))[:, :-1]
        return -jnp.sum(jnp.asarray(pull[:, 1:], jnp.float32) * every)

    expected = jax.jit(jax.grad(written_out))(STUDENT)
    np.testing.assert_allclose(value, -pull.sum(), atol=1e-6)
    assert distance(gradient, expected) < 1e-5


def test_group_advantage_stands_beside_the_teachers():
    reward = Reward(np.array([True, False, True, True]), 2)
    terms = default_terms(pg_weight=1.0, teacher_coef=0.5, group_coef=2.0)
    scores = scored(None)
    got = advantages(SAMPLED, scores, MASK, terms, reward=reward)
    ratio = scores.teacher_logprob_BT - scores.student_logprob_BT
    # (1, 0): mean 1/2, unbiased deviation sqrt(1/2): +-0.707106; (1, 1): 0
    group = np.array([0.707106, -0.707106, 0.0, 0.0])[:, None]
    np.testing.assert_allclose(got, np.where(MASK, 0.5 * ratio + 2.0 * group, 0.0), atol=1e-5)
    alone = dataclasses.replace(terms, teacher_coef=0.0, group_normalise=False)
    got = advantages(SAMPLED, scores, MASK, alone, reward=reward)
    np.testing.assert_allclose(
        got, np.where(MASK, np.array([1.0, -1.0, 0, 0])[:, None], 0.0), atol=1e-6
    )


@pytest.mark.slow
def test_group_advantage_beside_a_support():
    """Both surrogates, of the sampled token and of the support, in one term."""
    reward = Reward(np.array([True, False, True, True]), 2)
    both = default_terms(
        pg_weight=1.0, advantage="support", support="teacher", top_k=K, group_coef=1.0
    )
    (value, _), _ = loss_of(both)(STUDENT, Frozen(), make_rows(both, "teacher", reward))
    support_alone = dataclasses.replace(both, group_coef=0.0)
    group_alone = dataclasses.replace(both, teacher_coef=0.0)
    (a, _), _ = loss_of(support_alone)(STUDENT, Frozen(), make_rows(support_alone, "teacher"))
    (b, _), _ = loss_of(group_alone)(STUDENT, Frozen(), make_rows(group_alone, "teacher", reward))
    np.testing.assert_allclose(value, a + b, rtol=1e-5)
    assert abs(float(a)) > 1e-3


def test_clamp_discount_and_importance_by_hand():
    made = Rollout(
        tokens_BT=np.zeros((1, 5), np.int32), length_B=np.array([4]),
        prompt_length_B=np.array([1]), outcome_B=np.array([Outcome.EOS]),
        sampler_logprob_BT=np.log([[1, 0.5, 0.1, 0.4, 1]]).astype(np.float32),
    )  # fmt: skip
    student = np.log([[1, 0.5, 0.4, 0.2, 1]]).astype(np.float32)
    ratio = np.array([[9.0, -8.0, 1.0, 2.0, 9.0]], np.float32)
    scores = Scores(
        student_logprob_BT=student, student_entropy_BT=student, teacher_logprob_BT=student + ratio
    )
    mask = made.response_mask_BT

    def advantage(**changes: float) -> np.ndarray:
        terms = default_terms(pg_weight=1.0, **changes)
        return advantages(made, scores, mask, terms)[0]

    np.testing.assert_allclose(advantage(), [0, -8, 1, 2, 0], atol=1e-5)
    np.testing.assert_allclose(advantage(advantage_clamp=5.0), [0, -5, 1, 2, 0], atol=1e-5)
    # 1 + 2/2 = 2, -8 + 2/2 = -7; clamped first: -5 + 1 = -4
    np.testing.assert_allclose(advantage(discount=0.5), [0, -7, 2, 2, 0], atol=1e-5)
    both = advantage(discount=0.5, advantage_clamp=5.0)
    np.testing.assert_allclose(both, [0, -4, 2, 2, 0], atol=1e-5)
    # weights 1, min(4, 2) = 2, 1/2
    np.testing.assert_allclose(advantage(importance_cap=2.0), [0, -8, 2, 1, 0], atol=1e-5)


def test_counted_tokens_of_truncated_rollouts():
    def kept(truncated: str, tail: int = 2) -> np.ndarray:
        return batch.counted(SAMPLED, MASK, truncated=truncated, tail=tail)

    ran_out = np.array([False, True, False, True])
    np.testing.assert_array_equal(kept("keep"), MASK)
    np.testing.assert_array_equal(kept("mask"), MASK & ~ran_out[:, None])
    for b in range(4):
        lost = 2 if ran_out[b] else 0
        assert kept("tail")[b].sum() == MASK[b].sum() - lost
        assert not kept("tail")[b, SAMPLED.length_B[b] - lost :].any()
    assert not kept("tail", tail=1000)[ran_out].any()


def test_shares_of_a_batch_are_weighed_among_themselves():
    terms = default_terms(pg_weight=1.0)
    for aggregation in losses.AGGREGATIONS:
        weigh = functools.partial(losses.token_weights, aggregation=aggregation, length=7)
        given = batch.rollout_rows(
            SAMPLED, scored(None), MASK, np.zeros((4, 10), np.float32), terms, weigh=weigh
        )
        for i in range(2):
            part = batch.share(given, i, 2, weigh=weigh)
            expected = weigh(MASK[2 * i : 2 * i + 2])
            np.testing.assert_allclose(part.weight_BT, expected, rtol=1e-6)


def test_what_terms_need():
    assert default_terms(pg_weight=1.0).needs_teacher
    grpo = default_terms(pg_weight=1.0, teacher_coef=0.0, group_coef=1.0)
    assert not grpo.needs_teacher
    assert grpo.needs_reward
    assert grpo.scored_support is None
    assert TERMS.scored_support == ("teacher", K)
    assert not TERMS.over_vocabulary
    assert dataclasses.replace(TERMS, support="full").over_vocabulary
    assert (
        default_terms(pg_weight=1.0, support="teacher").scored_support is None
    )  # nothing is over it
    raised = default_terms(pg_weight=1.0, traced_at_zero=("reference_kl", "sft"))
    assert raised.needs_reference
    assert raised.needs_golden
    assert not default_terms(pg_weight=1.0).needs_reference


@pytest.mark.parametrize(
    "numbers",
    [
        {"support": "union", "form": "tail"},
        {
            "support": "union",
            "form": "teacher_renormalised",
            "direction": "forward",
            "gate": "entropy",
        },
    ],
    ids=["tail", "gate"],
)
def test_no_array_of_batch_time_vocabulary_with_supports(numbers):
    terms = dataclasses.replace(TERMS, **numbers)
    config = tiny_config(num_layers=1, vocab_size=2000)
    loss = objective.make_rollout_loss(terms, config, token_chunk=8, remat="none")
    given = make_rows(dataclasses.replace(TERMS, support="union"), "union")
    if terms.gated:
        given = given.replace(divergence_gate_BT=np.ones(MASK.shape, np.float32))

    def total(params):
        return loss(params, Frozen(), given, terms.weights)[0]

    largest = max(sizes(jax.make_jaxpr(jax.grad(total))(decoder.abstract_params(config)).jaxpr))
    # the chunk's logits, or the embedding: nothing grows with tokens times vocabulary
    assert 8 * 2000 <= largest <= 2000 * config.hidden_size
