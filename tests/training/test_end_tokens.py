"""The end of a response as one event: value and gradient of every term against float64 formulas.

Student, teacher and reference have end tokens of their own: two, two and two, one of them beyond the
ids that the tokenizers share. The formulas below know of events alone: P(end) is the sum of the
probabilities of a model's own end tokens, the others are scored ids.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from opd_jax import losses
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.scoring.topk import SUPPORTS
from opd_jax.training import batch, objective
from opd_jax.training.advantages import Reward, advantages
from opd_jax.training.terms import Terms, default_terms
from opd_jax.types import Ends, Frozen, Outcome, Rollout
from tests.conftest import noisy_params, random_rows, tiny_config
from tests.support import calls
from tests.support.lanes import slow

pytestmark = pytest.mark.short

SHARED = 90  # ids that the tokenizers share; both models have more rows
ENDS = Ends(id=50, student=(7, 50), teacher=(3, 95), reference=(50, 61))
STUDENT = tiny_config(num_layers=1, tie_embeddings=False, vocab_size=96)
TEACHER = tiny_config(num_layers=1, tie_embeddings=False, hidden_size=24, vocab_size=104)
SCORED = np.ones(SHARED, bool)
SCORED[[7, 3, 61, 11]] = False  # other ends, those of the others, and an id that is masked
EVENTS = Events(scored_V=SCORED, ends=ENDS)
PROMPT, K = 3, 5
TOKENS, LENGTH = (np.array(x) for x in random_rows(tiny_config(vocab_size=SHARED), 4, 10))
LENGTH[:] = (8, 10, 6, 10)
TOKENS[np.arange(10)[None] >= LENGTH[:, None]] = 0
TOKENS[np.isin(TOKENS, [3, 7, 11, 50, 61])] = 20
TOKENS[0, 7], TOKENS[1, 9], TOKENS[2, 5] = 7, 50, 50  # the last row runs out of budget
ROLLOUT = Rollout(
    tokens_BT=TOKENS,
    length_B=LENGTH,
    prompt_length_B=np.full(4, PROMPT),
    sampler_logprob_BT=np.zeros((4, 10), np.float32),
    outcome_B=np.array([Outcome.EOS, Outcome.EOS, Outcome.EOS, Outcome.BUDGET]),
)
COUNTED = SCORED.copy()
COUNTED[[7, 50]] = True
MASK = batch.scored_mask(ROLLOUT, COUNTED)
WEIGHT = np.asarray(losses.token_weights(MASK, "token"))
REWARD = np.array([1.0, 0.0, 0.0, 1.0])


@functools.cache
def weights(name: str) -> decoder.Params:
    config, seed = {"student": (STUDENT, 0), "teacher": (TEACHER, 1), "reference": (STUDENT, 2)}[
        name
    ]
    return noisy_params(config, seed=seed)


@functools.cache
def hidden(name: str) -> np.ndarray:
    """What predicts token t, at t: float64 [B, T, D]."""
    config = TEACHER if name == "teacher" else STUDENT
    states = calls.hidden_states(weights(name), config, jnp.asarray(TOKENS), jnp.asarray(LENGTH))
    states = np.asarray(states, np.float64)
    return np.concatenate([np.zeros_like(states[:, :1]), states[:, :-1]], axis=1)


@functools.cache
def logits(name: str) -> np.ndarray:
    return hidden(name) @ np.asarray(decoder.head(weights(name)), np.float64).T


@functools.cache
def events(name: str) -> np.ndarray:
    return events_of(name, logits(name))


def events_of(name: str, logit: np.ndarray) -> np.ndarray:
    """Log-probs of the events, float64 [B, T, SHARED]; -inf where an id is none.

    P(v) = exp(l_v) / Z and P(end) = sum_{i in ends} exp(l_i) / Z, with Z over both.
    """
    own = list(getattr(ENDS, name))
    out = np.where(SCORED, logit[..., :SHARED], -np.inf)
    out[..., ENDS.id] = scipy.special.logsumexp(logit[..., own], axis=-1)
    return out - scipy.special.logsumexp(out, axis=-1, keepdims=True)


def of_tokens(logprob: np.ndarray) -> np.ndarray:
    event = np.where(np.isin(TOKENS, ENDS.student), ENDS.id, TOKENS)
    return np.take_along_axis(logprob, event[..., None], axis=-1)[..., 0]


def scores(**asked):
    return calls.score(
        weights("student"), STUDENT, weights("teacher"), TEACHER, TOKENS, LENGTH,
        vocabulary=SHARED, top_k=3, token_chunk=7, microbatch_tokens=20, events=EVENTS, **asked,
    )  # fmt: skip


def test_the_scorer_gives_every_end_token_the_log_prob_of_the_end():
    got = scores()
    for name, values in (("student", got.student_logprob_BT), ("teacher", got.teacher_logprob_BT)):
        want = of_tokens(events(name))
        np.testing.assert_allclose(values[MASK], want[MASK], atol=2e-5)
    ended = (np.array([0, 1, 2]), LENGTH[:3] - 1)
    assert MASK[ended].all()  # both tokens of the student's set count
    alone = scipy.special.log_softmax(logits("student")[..., :SHARED], axis=-1)
    apart = np.take_along_axis(alone, TOKENS[..., None], axis=-1)[..., 0]
    assert (got.student_logprob_BT[ended] > apart[ended] + 0.1).all()  # the sum of two tokens


def test_entropy_and_divergence_are_over_events():
    got = scores()
    p, q = (events(name) for name in ("student", "teacher"))
    inside = SCORED
    entropy = -np.sum(np.exp(p[..., inside]) * p[..., inside], axis=-1)
    kl = np.sum(np.exp(p[..., inside]) * (p[..., inside] - q[..., inside]), axis=-1)
    np.testing.assert_allclose(got.student_entropy_BT[MASK], entropy[MASK], atol=2e-5)
    np.testing.assert_allclose(got.reverse_kl_BT[MASK], kl[MASK], atol=2e-5)


@pytest.mark.slow
def test_sampler_and_scorer_agree_on_the_end():
    """Whatever end token is drawn, the sampler's record is the scorer's log-prob of the end."""
    drawn_V = SCORED.copy()
    drawn_V[[7, 50]] = True
    rollout = calls.roll(
        weights("student"), STUDENT, [[5, 6, 8]] * 64, key=jax.random.key(0),
        max_response_tokens=24, stop_ids=ENDS.student, vocabulary=SHARED, drawn_V=drawn_V,
        events=EVENTS,
    )  # fmt: skip
    last = rollout.tokens_BT[np.arange(64), rollout.length_B - 1]
    ended = rollout.outcome_B == Outcome.EOS
    assert set(last[ended].tolist()) == {7, 50}  # both are drawn, and nothing else ends a row
    got = calls.score(
        weights("student"), STUDENT, None, None, rollout.tokens_BT, rollout.length_B,
        vocabulary=SHARED, top_k=0, token_chunk=64, microbatch_tokens=512, events=EVENTS,
    )  # fmt: skip
    mask = rollout.response_mask_BT
    gap = np.abs(got.student_logprob_BT - rollout.sampler_logprob_BT)[mask]
    assert gap.max() < 1e-4
    place = (np.flatnonzero(ended), rollout.length_B[ended] - 1)
    assert (rollout.sampler_logprob_BT[place] != 0).all()


def test_a_temperature_divides_the_logits_of_every_model_before_the_ends_are_summed():
    """Two ids and two end tokens with logits log 1, log 4, log 9, log 4: at 2 they weigh 1, 2, 3, 2."""
    logit = jnp.log(jnp.array([1.0, 4.0, 9.0, 4.0]))
    ends = Ends(id=3, student=(2, 3))
    scored = np.array([True, True, False, True])
    got = Events(scored_V=scored, ends=ends, temperature=2.0).restrict(logit)
    np.testing.assert_allclose(jax.nn.softmax(got), [1 / 8, 2 / 8, 0, 5 / 8], atol=1e-6)
    plain = Events(scored_V=scored, ends=ends).restrict(logit)
    np.testing.assert_allclose(jax.nn.softmax(plain), [1 / 18, 4 / 18, 0, 13 / 18], atol=1e-6)


@pytest.mark.slow
def test_the_sampler_records_what_the_scorer_says_at_its_temperature():
    tempered = Events(scored_V=SCORED, ends=ENDS, temperature=0.7)
    counted = SCORED.copy()
    counted[[7, 50]] = True
    rollout = calls.roll(
        weights("student"), STUDENT, [[5, 6, 8]] * 8, key=jax.random.key(0), temperature=0.7,
        max_response_tokens=12, stop_ids=ENDS.student, vocabulary=SHARED, drawn_V=counted,
        events=tempered,
    )  # fmt: skip
    got = calls.score(
        weights("student"), STUDENT, None, None, rollout.tokens_BT, rollout.length_B,
        vocabulary=SHARED, top_k=0, token_chunk=64, microbatch_tokens=512, events=tempered,
    )  # fmt: skip
    gap = np.abs(got.student_logprob_BT - rollout.sampler_logprob_BT)[rollout.response_mask_BT]
    assert gap.max() < 1e-4


# One formula a term: the value of the loss as a function of the student's logits, in float64.
# `p` are log-probs of the events as they move, `held` those before, which are constants.
Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]


def taken(p: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_v over the scored events of exp(p) * values."""
    return np.sum(np.exp(p[..., SCORED]) * values[..., SCORED], axis=-1)


def opd(p, held):
    return -(of_tokens(events("teacher")) - of_tokens(held)) * of_tokens(p)


def grpo(p, held):
    advantage = losses.group_advantage(reward_B=jnp.asarray(REWARD), group=4, normalise=True)
    return -np.asarray(advantage, np.float64)[:, None] * of_tokens(p)


def kl_to(name: str) -> Formula:
    return lambda p, held: taken(p, p - np.where(SCORED, events(name), 0.0))


def estimator(k: int) -> Formula:
    def value(p, held):
        d = of_tokens(p) - of_tokens(events("reference"))
        return {1: d, 2: d * d / 2, 3: np.exp(-d) - 1 + d}[k]

    return value


def forward(p, held):
    q = events("teacher")
    return taken(q, np.where(SCORED, q, 0.0) - np.where(SCORED, p, 0.0))


def chosen(support: str, held: np.ndarray) -> np.ndarray:
    """Which events belong to the support, bool [B, T, SHARED]."""
    mine, theirs = np.zeros_like(held, bool), np.zeros_like(held, bool)
    for member, logprob in ((mine, held), (theirs, events("teacher"))):
        np.put_along_axis(member, np.argsort(-logprob, axis=-1)[..., :K], True, axis=-1)
    return {
        "student": mine, "teacher": theirs, "intersection": mine & theirs, "union": mine | theirs,
        "symmetric_difference": mine ^ theirs,
    }[support]  # fmt: skip


def renormalised(support: str) -> Formula:
    def value(p, held):
        inside = chosen(support, held)
        some = inside.any(axis=-1)
        p, q = (np.where(inside, x, -np.inf) for x in (p, events("teacher")))
        with np.errstate(invalid="ignore"):
            p, q = (x - scipy.special.logsumexp(x, axis=-1, keepdims=True) for x in (p, q))
            terms = np.where(inside, np.exp(p) * (p - q), 0.0)
        return np.where(some, terms.sum(axis=-1), 0.0)

    return value


def over_support(support: str) -> Formula:
    """2604.13016's surrogate: -sum_v w(v) (log q - log p_old) p(v) / p_old(v)."""

    def value(p, held):
        inside, q = chosen(support, held), events("teacher")
        weight = np.where(inside, np.exp(held), 0.0)
        if support != "symmetric_difference":
            weight /= np.maximum(weight.sum(axis=-1, keepdims=True), 1e-300)
        with np.errstate(invalid="ignore"):
            each = np.where(inside, weight * (q - held) * np.exp(p - held), 0.0)
        return -each.sum(axis=-1)

    return value


DIVERGES = {"divergence_weight": 1.0}
CASES: dict[str, tuple[Terms, Formula]] = {
    "OPD": (default_terms(pg_weight=1.0), opd),
    "GRPO": (default_terms(pg_weight=1.0, teacher_coef=0.0, group_coef=1.0), grpo),
    "reference KL": (default_terms(pg_weight=0.0, beta_kl=1.0), kl_to("reference")),
    "reference k1": (default_terms(pg_weight=0.0, beta_kl=1.0, kl_estimator="k1"), estimator(1)),
    "reference k2": (default_terms(pg_weight=0.0, beta_kl=1.0, kl_estimator="k2"), estimator(2)),
    "reference k3": (default_terms(pg_weight=0.0, beta_kl=1.0, kl_estimator="k3"), estimator(3)),
    "reverse KL": (default_terms(pg_weight=0.0, **DIVERGES), kl_to("teacher")),
    "forward KL": (default_terms(pg_weight=0.0, **DIVERGES, direction="forward"), forward),
}
_GOLDEN = {"pg_weight": 0.0, "golden_divergence": 1.0}
CASES["reverse KL, golden"] = default_terms(**_GOLDEN, golden_direction="reverse"), kl_to("teacher")
CASES["forward KL, golden"] = default_terms(**_GOLDEN), forward
for _support in SUPPORTS[1:]:
    _over = {"support": _support, "top_k": K}
    CASES[f"KL over {_support}"] = (
        default_terms(pg_weight=0.0, **DIVERGES, **_over, form="renormalised"), renormalised(_support),
    )  # fmt: skip
    CASES[f"advantage over {_support}"] = (
        default_terms(pg_weight=1.0, advantage="support", **_over), over_support(_support),
    )  # fmt: skip


def gradient(terms: Terms) -> np.ndarray:
    """The code's gradient in the student's output matrix [96, D]."""
    given = scores(support=terms.scored_support, keep_hidden=terms.reads_head)
    settings = {"token_chunk": 7, "remat": "none", "events": EVENTS.replace(vocabulary=SHARED)}
    if terms.needs_golden:
        made = batch.golden_rows(ROLLOUT, weigh=lambda _: WEIGHT, scores=given, scored_BT=MASK)
        loss = objective.make_golden_loss(terms, STUDENT, **settings)
    else:
        advantage = advantages(ROLLOUT, given, MASK, terms, reward=Reward(REWARD, 4))
        made = batch.rollout_rows(ROLLOUT, given, MASK, advantage, terms, weigh=lambda _: WEIGHT)
        loss = objective.make_rollout_loss(terms, STUDENT, STUDENT, **settings)
    frozen = Frozen(reference=weights("reference"), teacher=decoder.head_alone(weights("teacher")))

    def of_head(kernel):
        params = weights("student") | {"head": {"kernel": kernel}}
        return loss(params, frozen, made, dict.fromkeys(terms.weights, 1.0))[0]

    return np.asarray(jax.jit(jax.grad(of_head))(decoder.head(weights("student"))))


FAST = ("OPD", "GRPO", "reference KL", "forward KL")


@pytest.mark.parametrize("name", [*FAST, *slow(*(name for name in CASES if name not in FAST))])
def test_the_gradient_on_the_end_tokens_is_that_of_the_formula(name):
    """Central differences in float64 of the written-out loss, along random directions of the rows of
    both end tokens, of an ordinary id, and of an end token of the teacher's."""
    terms, formula = CASES[name]
    got = gradient(terms)
    base, states = logits("student"), hidden("student")
    held = events("student")
    step = 1e-5

    def value(i: int, change: np.ndarray) -> float:
        moved = base.copy()
        moved[..., i] += states @ change
        loss = formula(events_of("student", moved), held)
        return np.sum(np.where(MASK, WEIGHT * loss, 0.0))

    for i in (7, 50, 20, 3):
        for direction in np.random.default_rng(i).standard_normal((3, states.shape[-1])):
            want = (value(i, step * direction) - value(i, -step * direction)) / (2 * step)
            assert got[i] @ direction == pytest.approx(want, abs=1e-6), f"row {i}"
            if i in ENDS.student and "over" not in name:
                assert abs(want) > 1e-4  # neither token of the set is left out
