"""Log-probs of spans of text, the pieces in which two tokenizations end at the same byte.

NumPy, on the host, where the scores of two models with different tokenizers meet.
"""

import numpy as np

from opd_jax.shapes import check_shapes


def span_logprob(*, token_logprob_BT: np.ndarray, span_BT: np.ndarray, spans: int) -> np.ndarray:
    """log P(span | its prefix) = sum of log P(token | prefix) over its tokens. float64 [B, X].

    `span_BT`: int32, the span of each token, -1 for tokens of none; X = `spans`. The chain rule, exact for
    these tokens: it is not summed over the other ways in which the same tokenizer could write the span.
    """
    check_shapes(token_logprob_BT=token_logprob_BT, span_BT=span_BT)
    out = np.zeros((len(span_BT), spans + 1))
    np.add.at(out, (np.arange(len(span_BT))[:, None], span_BT), np.asarray(token_logprob_BT, float))
    return out[:, :spans]  # the last column is that of -1


def at_tokens(*, values_BX: np.ndarray, span_BT: np.ndarray) -> np.ndarray:
    """Give each token the value of its span; float32 [B, T], 0 for tokens of none."""
    padded = np.pad(np.asarray(values_BX, np.float32), ((0, 0), (0, 1)))
    return np.take_along_axis(padded, np.asarray(span_BT), axis=1)


def closed(*, mask_BT: np.ndarray, span_BT: np.ndarray) -> np.ndarray:
    """Return the tokens of the spans all of whose tokens are in the mask; bool [B, T]."""
    spans = int(span_BT.max(initial=-1)) + 1
    left_out_BX = span_logprob(token_logprob_BT=~mask_BT, span_BT=span_BT, spans=spans)
    return mask_BT & (span_BT >= 0) & (at_tokens(values_BX=left_out_BX, span_BT=span_BT) == 0)


def anchors(span_BT: np.ndarray, *, last: bool) -> np.ndarray:
    """Return the first token of each span, or its last; bool [B, T]. The tokens of a span are adjacent."""
    beyond = {"append": -1} if last else {"prepend": -1}
    return (span_BT >= 0) & (np.diff(span_BT, axis=1, **beyond) != 0)
