"""Problems, prompts and golden solutions, as token ids."""

from opd_jax.data.loader import golden_rows, make_batches, prompt_ids, split_of
from opd_jax.data.tiny import Problem, problem
from opd_jax.data.tokenizer import Tokenizer

__all__ = [
    "Problem",
    "Tokenizer",
    "golden_rows",
    "make_batches",
    "problem",
    "prompt_ids",
    "split_of",
]
