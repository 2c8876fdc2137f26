"""Scoring of given rows by student and teacher: log-probs, entropies, divergences, top-k sets."""

from opd_jax.scoring.chunked import Readout, align, map_tokens, move, sum_tokens, take
from opd_jax.scoring.score import (
    Models,
    ScoreSpec,
    programs,
    score,
    score_part,
    teacher_states,
    token_logprob,
)

__all__ = [
    "Models",
    "Readout",
    "ScoreSpec",
    "align",
    "map_tokens",
    "move",
    "programs",
    "score",
    "score_part",
    "sum_tokens",
    "take",
    "teacher_states",
    "token_logprob",
]
