"""Scoring of given rows by student and teacher: log-probs, entropies, divergences, top-k sets."""

from opd_jax.scoring.chunked import align, map_tokens, take
from opd_jax.scoring.score import programs, score, score_part, teacher_states, token_logprob

__all__ = [
    "align",
    "map_tokens",
    "programs",
    "score",
    "score_part",
    "take",
    "teacher_states",
    "token_logprob",
]
