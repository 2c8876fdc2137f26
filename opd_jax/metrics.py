"""What a step looked like: pure functions of texts, rollouts and scores."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.masked import masked_mean
from opd_jax.types import Outcome, Rollout, Scores


def truncated(outcome_B: np.ndarray) -> np.ndarray:
    """1{the budget ran out and no end token was emitted}; bool [B]. (2604.08527, section 3.2).

    TruncRate is its mean. An end token in the last slot of the budget is not truncation.
    """
    return np.asarray(outcome_B) == Outcome.BUDGET


def compression_ratio(text: str, *, tail: int) -> float:
    """CompRatio = |bytes(tail_L)| / |zlib(bytes(tail_L))|, tail_L the last L characters, UTF-8, level 6.

    2604.08527, section 3.2. About 1 to 3 for prose, above 10 for text that repeats itself. zlib's
    own 11 bytes cap the ratio of short texts. 0 for an empty text.
    """
    data = text[-tail:].encode("utf-8", errors="replace")
    return len(data) / len(zlib.compress(data, 6)) if data else 0.0


def repetitive(text: str, *, tail: int, threshold: float) -> bool:
    """rep(o) = 1{|o| > L and CompRatio(o) > tau}: long, and its tail repeats. RepRate is its mean.

    2604.08527, section 3.2 (L = 10,000, tau = 10); texts of L characters or fewer are never flagged.
    """
    return len(text) > tail and compression_ratio(text, tail=tail) > threshold


def rollout_metrics(
    rollout: Rollout,
    student_logprob_BT: np.ndarray,
    mask_BT: np.ndarray,
    texts: list[str],
    *,
    tail: int,
    threshold: float,
) -> dict[str, float]:
    """The `rollout/*` keys of a step: outcomes, lengths, and how far sampler and scorer disagree.

    `mask_BT` holds the tokens that are scored (rows.scored_mask); the gap is taken over these.
    """
    length_B = rollout.response_length_B
    gap = np.abs(np.asarray(student_logprob_BT) - rollout.sampler_logprob_BT)[mask_BT]
    flagged = [repetitive(text, tail=tail, threshold=threshold) for text in texts]
    return {
        "rollout/truncation_rate": float(np.mean(truncated(rollout.outcome_B))),
        "rollout/repetition_rate": float(np.mean(flagged)),
        "rollout/length_mean": float(np.mean(length_B)),
        "rollout/length_max": float(np.max(length_B)),
        "rollout/tokens": float(np.sum(length_B)),
        "rollout/sampler_logprob_gap_max": float(np.max(gap, initial=0.0)),
        "rollout/sampler_logprob_gap_mean": float(np.mean(gap)) if gap.size else 0.0,
    }


@jax.jit
def score_metrics(scores: Scores, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """The `score/*` keys: means over all response tokens of the batch (`mask_BT`), on the device.

    entropy_gap = mean |H(q) - H(p)|; the overlap figures follow 2604.13016, Eqs. 6-10.
    """
    per_token = {
        "advantage_mean": scores.teacher_logprob_BT - scores.student_logprob_BT,
        "student_logprob_mean": scores.student_logprob_BT,
        "teacher_logprob_mean": scores.teacher_logprob_BT,
        "reverse_kl": scores.reverse_kl_BT,
        "student_entropy": scores.student_entropy_BT,
        "teacher_entropy": scores.teacher_entropy_BT,
        "entropy_gap": jnp.abs(scores.teacher_entropy_BT - scores.student_entropy_BT),
        "overlap_ratio": scores.overlap_ratio_BT,
        "overlap_advantage": scores.overlap_advantage_BT,
        "student_overlap_mass": scores.student_overlap_mass_BT,
        "teacher_overlap_mass": scores.teacher_overlap_mass_BT,
    }
    return {f"score/{name}": masked_mean(x_BT, mask_BT) for name, x_BT in per_token.items()}
