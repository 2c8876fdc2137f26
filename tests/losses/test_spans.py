"""Log-probs of spans by hand, and the gradient of a span's advantage given to every token of the span."""

import itertools

import numpy as np

from opd_jax.losses import spans

LOGPROB = np.log(np.array([[0.5, 0.25, 0.5, 0.1, 1.0]]))
SPAN = np.array([[-1, 0, 0, 1, -1]], np.int32)


def test_span_logprobs_by_hand():
    got_BX = spans.span_logprob(token_logprob_BT=LOGPROB, span_BT=SPAN, spans=3)
    np.testing.assert_allclose(got_BX, [[np.log(0.125), np.log(0.1), 0.0]])
    given_BT = spans.at_tokens(values_BX=got_BX, span_BT=SPAN)
    np.testing.assert_allclose(
        given_BT, [[0, np.log(0.125), np.log(0.125), np.log(0.1), 0]], rtol=1e-6
    )
    assert given_BT.dtype == np.float32


def test_a_span_counts_where_all_of_its_tokens_do():
    mask_BT = np.array([[True, True, False, True, True]])
    got_BT = spans.closed(mask_BT=mask_BT, span_BT=SPAN)
    assert got_BT.tolist() == [[False, False, False, True, False]]
    got_BT = spans.closed(mask_BT=np.ones((1, 5), bool), span_BT=SPAN)
    assert got_BT.tolist() == [[False, True, True, True, False]]
    nothing = spans.closed(mask_BT=np.ones((1, 2), bool), span_BT=np.full((1, 2), -1, np.int32))
    assert not nothing.any()


def test_the_surrogates_gradient_is_that_of_the_spans_reverse_kl():
    """E[sum over tokens of A grad log p(y_t)] = -grad KL(p || q), p of two tokens, q of the whole span."""
    generator = np.random.default_rng(0)
    table = generator.normal(
        size=(4, 3)
    )  # logits of the first token, and of the second behind each
    log_q = np.log(generator.dirichlet(np.ones(9)))
    words = list(itertools.product(range(3), repeat=2))

    def log_p(logits):
        log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return np.array([[log[0, a], log[1 + a, b]] for a, b in words])

    def kl(logits):
        both = log_p(logits).sum(axis=1)
        return np.sum(np.exp(both) * (both - log_q))

    span_BT = np.zeros((9, 2), np.int32)
    tokens_BT = log_p(table)
    student_BX = spans.span_logprob(token_logprob_BT=tokens_BT, span_BT=span_BT, spans=1)
    advantage_BT = spans.at_tokens(values_BX=log_q[:, None] - student_BX, span_BT=span_BT)
    assert np.allclose(advantage_BT.sum(axis=1), 2 * (log_q - tokens_BT.sum(axis=1)))
    probability = np.exp(tokens_BT.sum(axis=1))

    step = 1e-5
    for place in np.ndindex(table.shape):
        moved = table.copy()
        moved[place] += step
        slope_BT = (log_p(moved) - tokens_BT) / step
        got = np.sum(probability[:, None] * advantage_BT * slope_BT)
        assert abs(got + (kl(moved) - kl(table)) / step) < 1e-4
