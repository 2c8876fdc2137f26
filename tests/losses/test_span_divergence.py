"""Divergences at spans by hand, their gradients, and GOLD's numbers from TRL 1.16 (support/trl_gold.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opd_jax import losses
from opd_jax.data.spans import spans
from opd_jax.losses import span_divergence
from opd_jax.losses.span_divergence import Side
from tests.losses.conftest import log_softmax
from tests.support import trl_gold

pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]
NONE = np.zeros(0, np.int32)


def side(logprob, token=0, rest=0.0, size=1, shared=NONE) -> Side:
    """One span of one model; `logprob` [V]."""
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return Side(
        jnp.asarray(np.asarray(logprob)[None], dtype), jnp.array([token]), jnp.array([rest], dtype),
        jnp.array([size], dtype), jnp.asarray(np.asarray(shared, np.int32)),
    )  # fmt: skip


def logs(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities))


# candidates


def test_a_candidates_score_by_hand():
    """Pieces of .5 and .25 against one shared id of .3: -1.0397 and -1.2040, a share of .5410."""
    one = side(logs(0.5, 0.3, 0.2), token=0, rest=np.log(0.25), size=2, shared=[1])
    scores_CX = span_divergence.candidates(one, jnp.array([True]))
    np.testing.assert_allclose(scores_CX, [[-1.2040, -1.0397]], atol=1e-4)
    share = jax.nn.softmax(scores_CX, axis=-1)
    np.testing.assert_allclose(share, [[0.4590, 0.5410]], atol=1e-4)
    alone_CX = span_divergence.candidates(one, jnp.array([False]))
    np.testing.assert_array_equal(alone_CX[0, 1], -jnp.inf)


def test_the_divergence_of_candidates_by_hand():
    """p = (.4590, .5410), q = (.6, .2) / .8 = (.75, .25): .4590 log .6120 + .5410 log 2.1640 = .1922."""
    student = side(logs(0.5, 0.3, 0.2), token=0, rest=np.log(0.25), size=2, shared=[1])
    teacher = side(logs(0.2, 0.2, 0.6), token=1, rest=0.0, size=1, shared=[2])
    got = span_divergence.candidate_divergence(
        student, teacher, jnp.array([True]), direction="reverse"
    )
    np.testing.assert_allclose(got, [0.1922], atol=1e-4)


@pytest.mark.parametrize("direction", losses.DIRECTIONS)
def test_one_vocabulary_in_spans_of_one_is_the_plain_divergence(logits, direction):
    student, teacher = (log_softmax(x) for x in logits)
    share = 0.3 if direction not in ("reverse", "forward") else None
    plain = losses.divergence(
        p_logprob_BTV=jnp.asarray(student[None], jnp.float32),
        q_logprob_BTV=jnp.asarray(teacher[None], jnp.float32),
        direction=direction, form="raw", share=share,
    )[0]  # fmt: skip
    for t in range(len(student)):
        pair = [side(x[t], token=2, shared=np.arange(7)) for x in (student, teacher)]
        kind = {"direction": direction, "share": share}
        joint_C = jnp.array([False])
        for got in (
            span_divergence.candidate_divergence(*pair, joint_C, **kind),
            span_divergence.matched_divergence(*pair, joint_C, weight=1.0, **kind),
        ):
            np.testing.assert_allclose(got, plain[t : t + 1], atol=1e-6)


# merged spans


def test_a_merged_span_by_hand():
    """The last token's (.6, .4) behind a token of .5: (.3, .2), against (.5, .5) an L1 of .5."""
    one = side(logs(0.6, 0.4), token=1, rest=np.log(0.5), size=2)
    np.testing.assert_allclose(jnp.exp(span_divergence.merged(one)), [[0.3, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(one.span_C, [np.log(0.2)], rtol=1e-6)
    got = span_divergence.sorted_divergence(one, side(logs(0.5, 0.5), token=0))
    np.testing.assert_allclose(got, [0.5], rtol=1e-6)


def test_the_sorted_distance_by_hand():
    """(.5, .3, .2) against (.1, .9), sorted and padded: .4 + .2 + .2."""
    got = span_divergence.sorted_distance(
        p_CV=jnp.array([[0.2, 0.5, 0.3]]), q_CU=jnp.array([[0.1, 0.9]])
    )
    np.testing.assert_allclose(got, [0.8], rtol=1e-6)


def test_matched_ids_and_the_others_by_hand():
    """Ids 0 and 1 are pairs: D = KL of (.5, .3) and (.4, .1); the rest (.2) against (.3, .2): .1 + .2."""
    student = side(logs(0.5, 0.3, 0.2), token=0, shared=[0, 1])
    teacher = side(logs(0.1, 0.3, 0.4, 0.2), token=2, shared=[2, 0])
    got = span_divergence.matched_divergence(
        student, teacher, jnp.array([False]), weight=0.5, direction="reverse"
    )
    want = 0.5 * (0.5 * np.log(0.5 / 0.4) + 0.3 * np.log(0.3 / 0.1)) + 0.5 * 0.3
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_the_matched_text_of_a_longer_span_is_the_span():
    """Student .5 x (.6, .4), teacher (.7, .2, .1): its own text .2 and .7; the rest (.3) against (.2, .1)."""
    student = side(logs(0.6, 0.4), token=1, rest=np.log(0.5), size=2, shared=[0])
    teacher = side(logs(0.7, 0.2, 0.1), token=0, shared=[1])
    got = span_divergence.matched_divergence(
        student, teacher, jnp.array([True]), weight=0.25, direction="forward"
    )
    want = 0.25 * 0.7 * np.log(0.7 / 0.2) + 0.75 * (0.1 + 0.1)
    np.testing.assert_allclose(got, [want], rtol=1e-6)


@pytest.mark.parametrize("compared", span_divergence.SPAN_EVENTS)
def test_gradients_by_finite_differences(logits, compared):
    with jax.enable_x64(True):
        x = jnp.asarray(logits[0][0])
        teacher = side(log_softmax(logits[1][0][:5]), token=3, rest=-0.3, size=2, shared=[0, 1, 4])
        for joint in (True, False):
            size = 3 if joint else 1

            def value(x, rest, joint=joint, size=size):
                own = side(np.zeros(7), token=2, size=size, shared=[1, 0, 6])
                own = own._replace(logprob_CV=jax.nn.log_softmax(x)[None], rest_C=rest)
                joint_C = jnp.array([joint])
                if compared == "sorted":
                    return span_divergence.sorted_divergence(own, teacher)[0]
                if compared == "candidates":
                    return span_divergence.candidate_divergence(
                        own, teacher, joint_C, direction="reverse"
                    )[0]
                return span_divergence.matched_divergence(
                    own, teacher, joint_C, weight=0.4, direction="jsd", share=0.5
                )[0]

            check_grads(jax.jit(value), (x, jnp.array([-0.7 * joint])), order=1, modes=["rev"])


def test_the_teacher_has_no_gradient(logits):
    def value(y):
        teacher = side(np.zeros(7), token=1, shared=[2])._replace(
            logprob_CV=jax.nn.log_softmax(y)[None]
        )
        own = side(log_softmax(logits[0][0]), token=2, shared=[1])
        return span_divergence.sorted_divergence(own, teacher)[0]

    gradient = jax.grad(value)(jnp.asarray(logits[1][0], jnp.float32))
    np.testing.assert_array_equal(gradient, 0.0)


def test_sums_over_spans_by_hand():
    """Row 1 of spans 0 0 1 and a token of none; of row 2 nothing counts."""
    span_BT = jnp.array([[-1, 0, 0, 1], [-1, 0, 1, 1]])
    counts_BT = jnp.array([[False, True, True, True], [False] * 4])
    values_BT = jnp.array([[9.0, 1.0, 2.0, 4.0], [jnp.nan] * 4])
    got_BT = span_divergence.span_sums(values_BT, span_BT, counts_BT)
    np.testing.assert_array_equal(got_BT, [[0, 3, 3, 4], [0, 0, 0, 0]])


# GOLD in TRL 1.16


def ours(case: trl_gold.Case) -> dict[str, float]:
    """The mean over spans of `sorted` and `matched` for a case, from the same logits."""
    pair = case.student, case.teacher
    ends = [np.cumsum([len(model.vocabulary[i]) for i in model.tokens]) for model in pair]
    span_of = spans(*ends)
    logprob = [log_softmax(model.logits()) for model in pair]
    shared = trl_gold.shared(case)
    total = {"sorted": 0.0, "matched": 0.0}
    count = int(span_of[0].max()) + 1
    for span in range(count):
        sides, joint = [], False
        for model, log_TV, of, ids in zip(pair, logprob, span_of, shared, strict=True):
            places = np.flatnonzero(of == span)
            rest = sum(log_TV[t, model.tokens[t]] for t in places[:-1])
            last = places[-1]
            sides.append(side(log_TV[last], model.tokens[last], rest, len(places), ids))
            joint |= len(places) > 1
        total["sorted"] += float(span_divergence.sorted_divergence(*sides)[0])
        total["matched"] += float(
            span_divergence.matched_divergence(
                *sides, jnp.array([joint]), direction="jsd", share=0.5,
                weight=len(shared[1]) / len(case.teacher.vocabulary),
            )[0]
        )  # fmt: skip
    return {name: value / count for name, value in total.items()}


@pytest.mark.parametrize("name", trl_gold.CASES)
def test_merged_spans_sort_as_trl_sorts_them(name):
    assert ours(trl_gold.CASES[name])["sorted"] == pytest.approx(
        trl_gold.stored()[name]["sorted"], abs=1e-5
    )


def test_matched_ids_are_trls_in_spans_of_one():
    name = "spans of one"
    assert ours(trl_gold.CASES[name])["matched"] == pytest.approx(
        trl_gold.stored()[name]["matched"], abs=1e-5
    )


def test_trl_tells_equal_texts_apart_where_tokens_differ():
    """Both models are sure of abcd, as ab cd and abc d: our divergence is 0. TRL compares cd with cd and d
    with d, which stand behind different texts, and finds log 2 times the share of the matched ids."""
    name = "sure of one text"
    assert ours(trl_gold.CASES[name])["matched"] == pytest.approx(0.0, abs=1e-5)
    weight = 3 / 4
    assert trl_gold.stored()[name]["matched"] == pytest.approx(weight * np.log(2), abs=1e-3)


def test_trls_default_reads_logits_one_position_late():
    """Of the same two models it takes the second token from the flat logits behind the text: 1/5 and 1/4."""
    got = trl_gold.stored()["sure of one text"]
    assert got["observed"] == pytest.approx(0.25 - 0.2, abs=1e-6)
    assert got["sorted"] == pytest.approx(0.0, abs=1e-6)
