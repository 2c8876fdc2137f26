"""Repetition: detect repetitive texts and their repeated tokens, for metrics and losses."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.types import Outcome, Rollout

RULES = ("tail", "ngram")


@dataclasses.dataclass(frozen=True)
class RepetitionRule:
    """When a text counts as repetitive (2604.08527, section 3.2: L = 10,000, tau = 10).

    Attributes:
      tail: L, the number of final characters that are compressed.
      threshold: tau, the compression ratio above which a text is repetitive.
      level: the compression level of zlib, which the paper calls "fixed" and does not specify.
    """

    tail: int
    threshold: float
    level: int = 6


def make_repetition_rule(section: Mapping[str, Any]) -> RepetitionRule:
    """Return the rule of the config section `metrics`."""
    return RepetitionRule(
        tail=section["repetition_tail"],
        threshold=section["repetition_threshold"],
        level=section["repetition_level"],
    )


def compression_ratio(text: str, *, tail: int, level: int = 6) -> float:
    """CompRatio = |bytes(tail_L)| / |zlib(bytes(tail_L))|, tail_L the last L characters, in UTF-8.

    2604.08527, section 3.2. About 1 to 3 for prose, above 10 for text that repeats itself. zlib's own
    11 bytes cap the ratio of short texts. 0 for an empty text.
    """
    data = text[-tail:].encode("utf-8", errors="replace")
    return len(data) / len(zlib.compress(data, level)) if data else 0.0


def repetitive(text: str, rule: RepetitionRule) -> bool:
    """rep(o) = 1{|o| > L and CompRatio(o) > tau}: long, and its tail repeats. RepRate is its mean.

    2604.08527, section 3.2; texts of L characters or fewer are never flagged.
    """
    if len(text) <= rule.tail:
        return False
    return compression_ratio(text, tail=rule.tail, level=rule.level) > rule.threshold


def flagged(texts: Sequence[str], rule: RepetitionRule) -> np.ndarray:
    """Return `repetitive` for each text; bool [B]."""
    return np.fromiter((repetitive(text, rule) for text in texts), bool, len(texts))


def repeated_mask(
    rollout: Rollout,
    flagged_B: np.ndarray,
    *,
    rule: str,
    tail: int,
    ngram: int,
    decode: Callable[[list[int]], str],
) -> np.ndarray:
    """Return a mask of the responses' repetitive tokens by one of the `RULES`; bool [B, T].

    `tail` uses `flagged_B` (metrics.flagged) and `decode`; `ngram` uses only the ids.
    """
    if rule == "ngram":
        return ngram_mask(rollout, ngram=ngram)
    return tail_mask(rollout, flagged_B, tail=tail, decode=decode)


def tail_mask(
    rollout: Rollout, flagged_B: np.ndarray, *, tail: int, decode: Callable[[list[int]], str]
) -> np.ndarray:
    """Return a mask of the tokens in the last `tail` characters of the flagged rollouts; bool [B, T].

    This is R of 2604.08527, Eq. (4) and Fig. 4. The paper's rule for tokens is not published; here R is
    all tokens of the tail whose compression flagged the rollout. The end token is not in it: it has no
    characters, and it ended the repetition.
    """
    start_B = rollout.length_B.copy()
    for row in np.flatnonzero(flagged_B).tolist():
        ids = rollout.response(row)
        start_B[row] = rollout.prompt_length_B[row] + tail_start(ids, tail=tail, decode=decode)
    stop_B = rollout.length_B - (rollout.outcome_B == Outcome.EOS)
    position_T = np.arange(rollout.tokens_BT.shape[1])
    return (position_T >= start_B[:, None]) & (position_T < stop_B[:, None])


def tail_start(ids: list[int], *, tail: int, decode: Callable[[list[int]], str]) -> int:
    """Return the index of the token at which the last `tail` characters start; 0 for a shorter text.

    It is the last token from which on the text has at least `tail` characters. Found by bisection, which
    decodes every token once. A character that consists of several tokens is counted more than once where
    the bisection splits it, so the tail may start a few characters late.
    """
    low, high = 0, len(ids)
    beyond = 0  # number of characters from `high` on, fewer than `tail`
    while high - low > 1:
        middle = (low + high) // 2
        characters = len(decode(ids[middle:high])) + beyond
        if characters >= tail:
            low = middle
        else:
            high, beyond = middle, characters
    return low


def ngram_mask(rollout: Rollout, *, ngram: int) -> np.ndarray:
    """Return a mask of the tokens that complete an n-gram seen earlier in their response; bool [B, T].

    2605.11182 (n = 3; `build_token_repetition_mask` in its code). The first n - 1 tokens of a repeated
    n-gram are not marked, because the repetition is known only at its last token.
    """
    tokens_BT = rollout.tokens_BT
    mask_BT = np.zeros(tokens_BT.shape, bool)
    starts = tokens_BT.shape[1] - ngram + 1
    if starts < 1:
        return mask_BT
    start_S = np.arange(starts)
    inside_BS = (start_S >= rollout.prompt_length_B[:, None]) & (
        start_S + ngram <= rollout.length_B[:, None]
    )
    number_BS = np.where(inside_BS, _ngram_ids(tokens_BT, ngram), -1 - start_S)  # unique ids
    order_BS = np.argsort(number_BS, axis=1, kind="stable")  # equal n-grams become neighbours
    step_BS = np.diff(np.take_along_axis(number_BS, order_BS, axis=1), axis=1, prepend=-starts - 1)
    np.put_along_axis(mask_BT[:, ngram - 1 :], order_BS, step_BS == 0, axis=1)
    return mask_BT


def repeated_metrics(
    advantage_BT: np.ndarray | None, mask_BT: np.ndarray, repeated_BT: np.ndarray
) -> dict[str, float]:
    """Return the fraction of repetitive tokens, and the mean advantage of these and of the other tokens.

    2604.08527, Fig. 4: repetitive tokens have the larger advantage, which drives the collapse.
    """
    repeated = repeated_BT[mask_BT]
    row = {"score/repeated_token_fraction": float(np.mean(repeated)) if repeated.size else 0.0}
    if advantage_BT is not None:
        for name, subset in (("repeated", repeated), ("regular", ~repeated)):
            if subset.any():
                mean = np.mean(advantage_BT[mask_BT][subset], dtype=float)
                row[f"score/{name}_token_advantage"] = float(mean)
    return row


def _ngram_ids(tokens_BT: np.ndarray, ngram: int) -> np.ndarray:
    """Return an id of the n-gram that starts at each token; equal n-grams have equal ids. int64 [B, S]."""
    windows_BSN = np.lib.stride_tricks.sliding_window_view(tokens_BT, ngram, axis=1)
    vocabulary = int(tokens_BT.max()) + 1
    number_BS, numbers = np.zeros(windows_BSN.shape[:2], np.int64), 1
    for place in range(ngram):
        if numbers > 2**62 // vocabulary:  # digits in base `vocabulary` would overflow: renumber
            distinct, number = np.unique(number_BS, return_inverse=True)
            number_BS, numbers = number.reshape(number_BS.shape), len(distinct)
        number_BS = number_BS * vocabulary + windows_BSN[:, :, place]
        numbers *= vocabulary
    return number_BS
