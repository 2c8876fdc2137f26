"""Metrics of a step as pure functions of texts, rollouts and scores, in numpy on the host.

docs/metrics.md lists their keys and sources. Sums are computed in float64.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from opd_jax.metrics.correctness import right_against_wrong, sequence_reward
from opd_jax.metrics.repetition import repeated_metrics
from opd_jax.types import Outcome, Rollout, Scores, SpanScores

_WORD = re.compile(r"[^\W\d_]+")


@dataclasses.dataclass(frozen=True)
class Findings:
    """Results about a step's rollouts in addition to the scores; host arrays.

    Attributes:
      texts: the responses.
      mask_BT: tokens that are scored (batch.scored_mask).
      repeated_BT: repetitive tokens (repetition.repeated_mask).
      flagged_B: repetitive rollouts (repetition.flagged).
      correct_B: rollouts with a correct answer; None where rollouts are not graded.
      graded_B: rollouts that have a grade; None for all.
    """

    texts: Sequence[str]
    mask_BT: np.ndarray
    repeated_BT: np.ndarray
    flagged_B: np.ndarray
    correct_B: np.ndarray | None = None
    graded_B: np.ndarray | None = None


def step_metrics(
    rollout: Rollout,
    scores: Scores,
    findings: Findings,
    *,
    positions: Sequence[int],
    max_response_tokens: int,
    hedging: Sequence[str],
    stops_on_repetition: bool = False,
) -> dict[str, float]:
    """Return the `rollout/*` and `score/*` metrics of a step; without a teacher, only those that need none.

    Args:
      rollout, scores, findings: of the step.
      positions, max_response_tokens: see `score_metrics`.
      hedging: see `hedging_rate`.
      stops_on_repetition: whether decoding stops repetitive rollouts.
    """
    mask_BT = findings.mask_BT
    row = rollout_metrics(
        rollout,
        scores.student_logprob_BT,
        mask_BT,
        findings.flagged_B,
        stops_on_repetition=stops_on_repetition,
    )
    row |= score_metrics(
        scores, mask_BT, rollout.prompt_length_B,
        positions=positions, max_response_tokens=max_response_tokens,
    )  # fmt: skip
    if hedging:
        row["score/hedging_rate"] = hedging_rate(findings.texts, hedging)
    if scores.spans is not None:
        row |= span_metrics(scores.spans, mask_BT, rollout.response_mask_BT)
    advantage_BT = _advantage(scores)
    row |= repeated_metrics(advantage_BT, mask_BT, findings.repeated_BT)
    if advantage_BT is not None and mask_BT.any():
        row["score/extreme_probability_difference"] = extreme_probability_difference(
            scores, mask_BT
        )
    if findings.correct_B is not None:
        reward_B = None if advantage_BT is None else sequence_reward(advantage_BT, mask_BT)
        row |= right_against_wrong(reward_B, findings.correct_B, findings.graded_B)
    return row


def truncated(outcome_B: np.ndarray) -> np.ndarray:
    """Return 1{the token budget was used up without an end token}; bool [B]. (2604.08527, section 3.2)

    TruncRate is its mean. A rollout whose last allowed token is an end token is not truncated, and
    neither is a rollout that decoding stopped because of repetition.
    """
    return np.asarray(outcome_B) == Outcome.BUDGET


def rollout_metrics(
    rollout: Rollout,
    student_logprob_BT: np.ndarray,
    mask_BT: np.ndarray,
    flagged_B: np.ndarray,
    *,
    stops_on_repetition: bool = False,
) -> dict[str, float]:
    """Return outcomes, lengths, RepRate (mean of `flagged_B`), and the gap of sampler and scorer log-probs.

    The gap covers the scored tokens, `mask_BT`.
    """
    length_B = rollout.response_length_B
    gap = np.abs(np.asarray(student_logprob_BT)[mask_BT] - rollout.sampler_logprob_BT[mask_BT])
    row = {
        "rollout/truncation_rate": float(np.mean(truncated(rollout.outcome_B))),
        "rollout/repetition_rate": float(np.mean(flagged_B)),
        "rollout/length_mean": float(np.mean(length_B)),
        "rollout/length_max": float(np.max(length_B)),
        "rollout/tokens": float(np.sum(length_B)),
        "rollout/sampler_logprob_gap_max": float(np.max(gap, initial=0.0)),
        "rollout/sampler_logprob_gap_mean": float(np.mean(gap, dtype=float)) if gap.size else 0.0,
    }
    if stops_on_repetition:
        row["rollout/stopped_rate"] = float(np.mean(rollout.outcome_B == Outcome.REPETITION))
    return row


def score_metrics(
    scores: Scores,
    mask_BT: np.ndarray,
    prompt_length_B: np.ndarray | None = None,
    *,
    positions: Sequence[int] = (),
    max_response_tokens: int = 0,
) -> dict[str, float]:
    """Return means over the scored tokens of the batch, and over those in the first N tokens of responses.

    entropy_gap = mean |H(q) - H(p)|; the overlap metrics follow 2604.13016, Eqs. 6-10. Keys are
    `score/NAME`, 0 where no token is scored. Each N of `positions` below `max_response_tokens` adds
    `score/first_N/NAME`, and `rollout/first_N/tokens`, the number of tokens in that mean, unless it
    is 0. Two values of N give the mean of the tokens between them.
    """
    firsts = [first for first in positions if first < max_response_tokens]
    part = np.zeros(np.count_nonzero(mask_BT), np.intp)  # number of `firsts` <= a token's position
    if firsts:
        assert prompt_length_B is not None  # positions count from the end of the prompt
        part_T = np.searchsorted(firsts, np.arange(mask_BT.shape[1]), side="right")
        position_BT = np.arange(mask_BT.shape[1]) - prompt_length_B[:, None]
        part = part_T[position_BT[mask_BT]]

    def up_to(weights: np.ndarray | None = None) -> np.ndarray:
        """Return sums over the tokens within each of `firsts`, and over all."""
        return np.cumsum(np.bincount(part, weights, minlength=len(firsts) + 1))

    count = up_to()
    totals = {name: up_to(x_BT[mask_BT]) for name, x_BT in _per_token(scores).items()}
    row = {f"score/{name}": float(sums[-1] / max(count[-1], 1)) for name, sums in totals.items()}
    for i, first in enumerate(firsts):
        if count[i]:
            row[f"rollout/first_{first}/tokens"] = float(count[i])
            for name, sums in totals.items():
                row[f"score/first_{first}/{name}"] = float(sums[i] / count[i])
    return row


def _per_token(scores: Scores) -> dict[str, np.ndarray]:
    gap_BT = None
    if scores.teacher_entropy_BT is not None:
        gap_BT = np.abs(scores.teacher_entropy_BT - scores.student_entropy_BT)
    values = {
        "advantage_mean": _advantage(scores),
        "student_logprob_mean": scores.student_logprob_BT,
        "teacher_logprob_mean": scores.teacher_logprob_BT,
        "reverse_kl": scores.reverse_kl_BT,
        "student_entropy": scores.student_entropy_BT,
        "teacher_entropy": scores.teacher_entropy_BT,
        "entropy_gap": gap_BT,
        "overlap_ratio": scores.overlap_ratio_BT,
        "overlap_advantage": scores.overlap_advantage_BT,
        "student_overlap_mass": scores.student_overlap_mass_BT,
        "teacher_overlap_mass": scores.teacher_overlap_mass_BT,
    }
    return {name: np.asarray(x_BT) for name, x_BT in values.items() if x_BT is not None}


def span_metrics(
    scores: SpanScores, mask_BT: np.ndarray, response_BT: np.ndarray
) -> dict[str, float]:
    """Return `score/span_*`: the log-ratio of spans of text, of a teacher with another tokenizer.

    The log-ratio log q - log p is summed over the counted spans, each once, and divided by the student's
    tokens of these spans (`span_log_ratio`) and by their bytes. Its negative estimates the reverse KL of
    the text. `span_single` is the share of the student's tokens that are a span of one token of both,
    `span_compared` the share of all response tokens that are compared (`mask_BT`). 0 where nothing is.
    """
    size, theirs, teacher, student = (
        np.asarray(x_BT, float)[mask_BT]
        for x_BT in (
            scores.size_BT, scores.teacher_size_BT, scores.teacher_logprob_BT, scores.student_logprob_BT,
        )
    )  # fmt: skip
    total = float(np.sum((teacher - student) / size))  # the tokens of a span sum to its log-ratio
    tokens, length = size.size, int(np.sum(scores.bytes_BT[mask_BT]))
    return {
        "score/span_log_ratio": total / max(tokens, 1),
        "score/span_log_ratio_per_byte": total / max(length, 1),
        "score/span_single": float(np.sum((size == 1) & (theirs == 1))) / max(tokens, 1),
        "score/span_compared": tokens / max(int(np.sum(response_BT)), 1),
    }


def _advantage(scores: Scores) -> np.ndarray | None:
    """Return log q(y) - log p(y) of the sampled tokens, None without a teacher."""
    if scores.teacher_logprob_BT is None:
        return None
    return np.asarray(scores.teacher_logprob_BT) - np.asarray(scores.student_logprob_BT)


def hedging_rate(texts: Sequence[str], words: Sequence[str]) -> float:
    """Return the fraction of hedging words among the words of all texts; 0 where there are no words.

    2605.11182: "wait", "but" and "maybe" become more frequent before the collapse. A word is a sequence
    of letters; case is ignored.
    """
    hedges = {word.lower() for word in words}
    hedging = total = 0
    for text in texts:
        tokens = _WORD.findall(text.lower())
        total += len(tokens)
        hedging += sum(map(tokens.count, hedges))
    return hedging / total if total else 0.0


def extreme_probability_difference(scores: Scores, mask_BT: np.ndarray) -> float:
    """Return the mean over rollouts of p(y) - q(y) at the sampled token with the largest |log q - log p|.

    2604.13016, appendix B.2 and Fig. 19, which define it for top-k OPD, where the advantages of more
    tokens than the sampled one are known. Above 0, the teacher assigns the token a lower probability
    than the student. Rollouts without a scored token are ignored; at least one must have some.
    """
    student_BT, teacher_BT = (
        np.asarray(x, np.float32) for x in (scores.student_logprob_BT, scores.teacher_logprob_BT)
    )
    scored_B = mask_BT.any(axis=1)
    distance_BT = np.where(mask_BT, np.abs(teacher_BT - student_BT), -1.0)
    place = (np.flatnonzero(scored_B), distance_BT.argmax(axis=1)[scored_B])
    return float(np.mean(np.exp(student_BT[place]) - np.exp(teacher_BT[place]), dtype=float))
