"""Problems, prompts and golden solutions, as token ids."""

from opd_jax.data.loader import golden_rows, make_batches, prompt_ids
from opd_jax.data.problem import Problem
from opd_jax.data.source import Problems, open_problems, split_of
from opd_jax.data.tiny import problem
from opd_jax.data.tokenizer import Tokenizer

__all__ = [
    "Problem",
    "Problems",
    "Tokenizer",
    "golden_rows",
    "make_batches",
    "open_problems",
    "problem",
    "prompt_ids",
    "split_of",
]
