"""Metrics of a step: rollouts, scores, repetition, time and memory."""

from opd_jax.metrics.correctness import auroc, right_against_wrong, sequence_reward
from opd_jax.metrics.repetition import (
    RepetitionRule,
    compression_ratio,
    flagged,
    make_repetition_rule,
    ngram_mask,
    repeated_mask,
    repeated_metrics,
    repetitive,
    tail_mask,
)
from opd_jax.metrics.step import (
    Findings,
    extreme_probability_difference,
    hedging_rate,
    rollout_metrics,
    score_metrics,
    step_metrics,
    truncated,
)

__all__ = [
    "Findings",
    "RepetitionRule",
    "auroc",
    "compression_ratio",
    "extreme_probability_difference",
    "flagged",
    "hedging_rate",
    "make_repetition_rule",
    "ngram_mask",
    "repeated_mask",
    "repeated_metrics",
    "repetitive",
    "right_against_wrong",
    "rollout_metrics",
    "score_metrics",
    "sequence_reward",
    "step_metrics",
    "tail_mask",
    "truncated",
]
