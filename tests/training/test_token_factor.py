"""Token weights and gates in the rows of an update, and in its value and gradient."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses
from opd_jax.grading.grader import Grade
from opd_jax.losses import gates
from opd_jax.models import decoder
from opd_jax.rng import Stream, key_for
from opd_jax.training import batch
from opd_jax.training.advantages import Reward, advantages
from opd_jax.training.experience import Experience
from opd_jax.training.terms import Terms, default_terms
from opd_jax.training.token_factor import divergence_gate, measured, step_ids, token_factor
from opd_jax.types import Frozen, Outcome, Rollout, Scores
from tests.conftest import distance
from tests.support.lanes import slow
from tests.training.test_topk_objective import (
    BESIDE,
    CONFIG,
    LENGTH,
    MASK,
    SAMPLED,
    STUDENT,
    TOKENS,
    direct,
    loss_of,
    members,
    scored,
    whole,
)  # fmt: skip

KEY = key_for(0, 3, Stream.GATE)
GRADES = [Grade.CORRECT, Grade.WRONG, Grade.TIMEOUT, Grade.CORRECT]
RULES = [rule for rule in losses.TOKEN_WEIGHTS if rule != "none"]


def weigh(mask: np.ndarray, aggregation: str = "sequence") -> np.ndarray:
    return losses.token_weights(mask, aggregation)


def experience(scores: Scores, grades=GRADES) -> Experience:
    return Experience(SAMPLED, scores, MASK, MASK & False, MASK[:, 0], grades, [""] * 4)


@functools.cache
def scores() -> Scores:
    """With a statistic of zeros and ones."""
    known = scored("teacher")
    return known.replace(statistic_BT=(known.teacher_logprob_BT > known.student_logprob_BT) * 1.0)


def factor(counted=MASK, grades=GRADES, **numbers) -> np.ndarray | None:
    return token_factor(
        experience(scores(), grades), counted, default_terms(pg_weight=1.0, **numbers),
        weigh=weigh, group=2, decode=lambda ids: "\n\n" if ids[0] % 3 == 0 else "x",
    )  # fmt: skip


def rows(terms: Terms, factor_BT=None, gate_BT=None, counted=MASK):
    advantage = advantages(
        SAMPLED, scores(), MASK, terms,
        factor_BT=factor_BT if terms.token_weight_on == "teacher" else None,
    )  # fmt: skip
    return batch.rollout_rows(
        SAMPLED, scores(), counted, advantage, terms, weigh=weigh, factor_BT=factor_BT,
        gate_BT=gate_BT,
    )  # fmt: skip


# weights


def test_nothing_is_computed_without_a_rule_or_a_gate():
    assert factor() is None
    assert divergence_gate(scores(), MASK, default_terms(pg_weight=1.0), key=KEY) is None
    plain = rows(default_terms(pg_weight=1.0))
    assert plain.token_factor_BT is None
    assert plain.divergence_gate_BT is None
    assert batch.share(plain, 0, 1, weigh=weigh) is plain


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_the_sum_of_the_weights_of_what_counts(rule):
    """With a masked rollout and masked tokens, as the guard masks them; a lone token; no token at all."""
    counted = MASK.copy()
    counted[1] = False
    counted[2, np.flatnonzero(MASK[2])[1:]] = False
    got = factor(counted, token_weight=rule, token_weight_keep=0.4, token_weight_drop=0.1)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[~counted], 0.0)
    assert (got >= 0).all()
    weight = np.asarray(weigh(counted))
    np.testing.assert_allclose(np.sum(weight * got), np.sum(weight), rtol=1e-6)
    assert len(np.unique(got[counted])) > 1
    none = factor(MASK & False, token_weight=rule)
    np.testing.assert_array_equal(none, 0.0)


@pytest.mark.parametrize(
    "neutral",
    [
        {"token_weight": "iw", "token_weight_strength": 0.0},
        {"token_weight": "prune", "token_weight_drop": 0.0},
        {"token_weight": "prune", "token_weight_threshold": 0.0, "token_weight_least": 0.3},
        {"token_weight": "step", "token_weight_window": 1000},
        {"token_weight": "fire", "token_weight_strength": 0.0, "token_weight_keep": 1.0},
        {"token_weight": "tip", "token_weight_keep": 1.0},
        {"token_weight": "ta", "token_weight_keep": 1.0},
        {"token_weight": "selectkd", "token_weight_least": 1.0},
    ],
)
@pytest.mark.parametrize("on", losses.WEIGHTED)
def test_at_its_neutral_number_a_rule_is_plain_opd_to_the_bit(neutral, on):
    terms = default_terms(pg_weight=1.0, token_weight_on=on, **neutral)
    plain, got = rows(default_terms(pg_weight=1.0)), rows(terms, factor(**neutral))
    for parts in (1, 2):
        one, other = (batch.share(x, 0, parts, weigh=weigh) for x in (plain, got))
        assert other.token_factor_BT is None
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_factor_on_the_teacher_and_one_on_every_term():
    """The first multiplies the teacher's part of the advantage, the second the weight; the loss agrees."""
    chosen = {"token_weight": "tip", "token_weight_keep": 0.3}
    w = factor(**chosen)
    plain = default_terms(pg_weight=1.0, **chosen)
    on_all = batch.share(rows(plain, w), 0, 1, weigh=weigh)
    on_teacher = rows(dataclasses.replace(plain, token_weight_on="teacher"), w)
    base = rows(default_terms(pg_weight=1.0))
    np.testing.assert_array_equal(on_all.weight_BT, base.weight_BT * w)
    np.testing.assert_array_equal(on_all.advantage_BT, base.advantage_BT)
    np.testing.assert_array_equal(on_teacher.weight_BT, base.weight_BT)
    np.testing.assert_allclose(on_teacher.advantage_BT, base.advantage_BT * w, rtol=1e-6)
    (a, _), one = loss_of(plain)(STUDENT, Frozen(), on_all)
    (b, _), other = loss_of(plain)(STUDENT, Frozen(), on_teacher)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert distance(one, other) < 1e-6


def test_minibatches_have_the_factors_of_the_whole_batch():
    chosen = {"token_weight": "tip", "token_weight_keep": 0.3}
    w = factor(**chosen)
    whole_rows = rows(default_terms(pg_weight=1.0, **chosen), w)
    for i in range(2):
        part = batch.share(whole_rows, i, 2, weigh=weigh)
        here = slice(2 * i, 2 * i + 2)
        np.testing.assert_allclose(part.weight_BT, weigh(MASK[here]) * w[here], rtol=1e-6)


def test_a_weight_on_a_support():
    chosen = {"token_weight": "iw", "token_weight_on": "teacher", "advantage": "support"}
    terms = default_terms(pg_weight=1.0, support="teacher", top_k=5, **chosen)
    w = factor(**chosen)
    got = rows(terms, w).support_advantage_BTX
    plain = rows(dataclasses.replace(terms, token_weight="none")).support_advantage_BTX
    np.testing.assert_allclose(got, plain * w[..., None], rtol=1e-6)


def test_a_group_advantage_keeps_its_weight_where_the_teachers_is_weighed():
    """SOD: A_group + coef w_t l_t."""
    reward = Reward(np.array([True, False, True, True]), 2)
    w = factor(token_weight="step", token_weight_window=2)
    both = default_terms(
        pg_weight=1.0, group_coef=1.0, token_weight="step", token_weight_on="teacher"
    )
    got = advantages(SAMPLED, scores(), MASK, both, factor_BT=w, reward=reward)
    group = advantages(
        SAMPLED, scores(), MASK, dataclasses.replace(both, teacher_coef=0.0), reward=reward
    )
    ratio = np.where(MASK, scores().teacher_logprob_BT - scores().student_logprob_BT, 0.0)
    np.testing.assert_allclose(got, group + w * ratio, atol=1e-6)


# rollouts


def test_gates_of_rollouts():
    """Grades: correct, wrong | timed out, correct. Without a grade a rollout is closed."""
    open_B = factor(rollout_gate="correct").any(axis=1)
    np.testing.assert_array_equal(open_B, [True, False, False, True])
    gain = np.where(MASK, scores().teacher_logprob_BT - scores().student_logprob_BT, 0.0).sum(
        axis=1
    )
    open_B = factor(rollout_gate="agreement").any(axis=1)
    # A = (+, -) in the first group; the second has one grade, so its A is 0
    np.testing.assert_array_equal(open_B, [gain[0] > 0, gain[1] < 0, False, gain[3] < 0])
    every = factor(grades=[Grade.CORRECT] * 4, rollout_gate="correct")
    np.testing.assert_array_equal(every, MASK)  # all rewards are equal: exactly ones
    nothing = factor(grades=[Grade.WRONG] * 4, rollout_gate="correct")
    np.testing.assert_array_equal(nothing, 0.0)


def test_a_rollout_gate_and_a_token_rule():
    both = factor(rollout_gate="correct", token_weight="iw")
    weight = np.asarray(weigh(MASK))
    np.testing.assert_array_equal(both.any(axis=1), [True, False, False, True])
    np.testing.assert_allclose(np.sum(weight * both), 1.0, rtol=1e-6)
    alone = factor(token_weight="iw")
    scale = both[0, MASK[0]] / alone[0, MASK[0]]
    np.testing.assert_allclose(scale, scale[0], rtol=1e-6)


# steps


def test_steps_are_paragraphs_or_windows():
    pieces = ["a", " b\n", "\n", "\n c", "d\n\ne", "\n", "f", " \n \n", "g", "\n\n"]
    tokens = np.array([[99, *range(10)], [99, 99, 9, 0, 3, 0, 0, 0, 0, 0, 0]], np.int32)
    made = Rollout(
        tokens_BT=tokens, length_B=np.array([11, 5]), prompt_length_B=np.array([1, 2]),
        sampler_logprob_BT=tokens * 0.0, outcome_B=np.array([Outcome.EOS] * 2),
    )  # fmt: skip
    got = step_ids(made, window=0, decode=lambda ids: pieces[ids[0]])
    #                                   a  b \n \n c d..e \n f  _  g \n
    np.testing.assert_array_equal(got[0], [-1, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
    # A response may begin with a blank line; "\n c" alone is no blank line.
    np.testing.assert_array_equal(got[1], [-1, -1, 0, 0, 0] + [-1] * 6)
    got = step_ids(made, window=4, decode=lambda ids: "")
    np.testing.assert_array_equal(got[0], [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(got[1], [-1, -1, 0, 0, 0] + [-1] * 6)


# gates of tokens

EOPD = {
    "divergence_weight": 1.0, "direction": "forward", "support": "teacher", "top_k": 5,
    "form": "teacher_renormalised", "gate": "entropy",
}  # fmt: skip


def gate_of(terms: Terms) -> np.ndarray:
    return divergence_gate(scores(), MASK, terms, key=KEY)


def median_entropy() -> float:
    return float(np.median(scores().teacher_entropy_BT[MASK]))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("entropy", "teacher_renormalised"), *slow(("advantage", "raw"), ("acceptance", "raw")),
    ],
)  # fmt: skip
def test_a_gated_divergence_equals_the_direct_sum(kind, form):
    """Over all counted tokens: w_t (g_t D_t - (1 or 1 - g_t) A_t), at ratio 1."""
    threshold = median_entropy() if kind == "entropy" else 0.0
    terms = default_terms(
        pg_weight=1.0, **EOPD | {"gate": kind, "gate_threshold": threshold, "form": form}
    )
    gate = gate_of(terms)
    assert 0 < gate[MASK].mean() < 1
    (_, parts), gradient = loss_of(terms)(STUDENT, Frozen(), rows(terms, gate_BT=gate))
    p, q = whole("student"), whole("teacher")
    weight = np.asarray(weigh(MASK))
    kept = 1.0 - gate if kind in gates.REPLACING else np.ones_like(gate)
    divergence = surrogate = 0.0
    for b, t in np.argwhere(MASK):
        ids = members("teacher", p[b, t], q[b, t])
        divergence += weight[b, t] * gate[b, t] * direct("forward", form, p[b, t], q[b, t], ids)
        token = SAMPLED.tokens_BT[b, t]
        surrogate -= weight[b, t] * kept[b, t] * (q[b, t, token] - p[b, t, token])
    np.testing.assert_allclose(parts["divergence"], divergence, atol=1e-6)
    np.testing.assert_allclose(parts["opd"], surrogate, atol=1e-6)

    pull = np.zeros((*MASK.shape, CONFIG.vocab_size))  # of log p
    for b, t in np.argwhere(MASK):
        ids = members("teacher", p[b, t], q[b, t])
        target = np.exp(q[b, t, ids])
        target = target / target.sum() if form == "teacher_renormalised" else target
        pull[b, t, ids] += weight[b, t] * gate[b, t] * target
        token = SAMPLED.tokens_BT[b, t]
        pull[b, t, token] += weight[b, t] * kept[b, t] * (q[b, t, token] - p[b, t, token])

    def written_out(params):
        every = jax.nn.log_softmax(decoder.forward(params, CONFIG, TOKENS, LENGTH))[:, :-1]
        return -jnp.sum(jnp.asarray(pull[:, 1:], jnp.float32) * every)

    assert distance(gradient, jax.jit(jax.grad(written_out))(STUDENT)) < 1e-5


def test_an_open_gate_is_no_gate_and_a_closed_one_is_plain_opd():
    ungated = default_terms(pg_weight=1.0, **EOPD | {"gate": "none"})
    plain = loss_of(ungated)(STUDENT, Frozen(), rows(ungated))
    opened = dataclasses.replace(ungated, gate="entropy", gate_threshold=0.0)
    got = loss_of(opened)(STUDENT, Frozen(), rows(opened, gate_BT=gate_of(opened)))
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    closed = dataclasses.replace(ungated, gate="advantage", gate_threshold=-1.0)
    made = rows(closed, gate_BT=gate_of(closed))
    np.testing.assert_array_equal(
        made.advantage_BT, rows(default_terms(pg_weight=1.0)).advantage_BT
    )
    (_, parts), _ = loss_of(closed)(STUDENT, Frozen(), made)
    assert float(parts["divergence"]) == 0.0
    np.testing.assert_array_equal(parts["opd"], plain[0][1]["opd"])
    gkd = dataclasses.replace(closed, gate_threshold=1.0)
    made = rows(gkd, gate_BT=gate_of(gkd))
    np.testing.assert_array_equal(made.advantage_BT, 0.0)
    (_, parts), _ = loss_of(gkd)(STUDENT, Frozen(), made)
    assert float(parts["opd"]) == 0.0
    np.testing.assert_array_equal(parts["divergence"], plain[0][1]["divergence"])


@pytest.mark.slow
def test_a_gate_over_the_whole_vocabulary():
    terms = default_terms(
        pg_weight=1.0,
        **EOPD | {"support": "full", "form": "raw", "gate_threshold": median_entropy()},
    )
    gate = gate_of(terms)
    given = rows(terms, gate_BT=gate).replace(
        support=None, teacher_hidden_BTD=scored(None).teacher_hidden_BTD
    )
    (_, parts), _ = loss_of(terms)(STUDENT, BESIDE, given)
    p, q = whole("student")[MASK], whole("teacher")[MASK]
    forward = np.sum(np.exp(q) * (q - p), axis=-1)
    expected = np.sum(np.asarray(weigh(MASK))[MASK] * gate[MASK] * forward)
    np.testing.assert_allclose(parts["divergence"], expected, atol=1e-6)


def test_the_draws_of_a_step_are_the_same_again_and_others_at_the_next():
    terms = default_terms(pg_weight=1.0, **EOPD | {"gate": "acceptance", "form": "raw"})
    first, again = gate_of(terms), gate_of(terms)
    np.testing.assert_array_equal(first, again)
    later = divergence_gate(scores(), MASK, terms, key=key_for(0, 4, Stream.GATE))
    assert (first != later).any()
    np.testing.assert_array_equal(first[~MASK], 0.0)


def test_what_is_measured():
    terms = default_terms(pg_weight=1.0, token_weight="tip", **EOPD)
    gate = MASK * np.arange(10)[None] % 2
    w = factor(token_weight="tip", token_weight_keep=0.25)
    got = measured(rows(terms, w, gate.astype(np.float32)))
    assert got == {
        "loss/gate_open": pytest.approx(gate[MASK].mean()),
        "loss/unweighted_tokens": pytest.approx(1 - np.ceil(0.25 * MASK.sum()) / MASK.sum()),
    }
    assert measured(rows(default_terms(pg_weight=1.0))) == {}
    nothing = SimpleNamespace(weight_BT=np.zeros((1, 2)))
    assert measured(nothing) == {}
