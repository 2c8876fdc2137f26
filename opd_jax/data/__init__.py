"""Problems, prompts and golden solutions, as token ids."""

from opd_jax.data.alignment import Alignment, align, alone, ends_line, named
from opd_jax.data.alignment import report as alignment_report
from opd_jax.data.loader import Batch, PromptStyle, golden_rows, make_batches
from opd_jax.data.problem import Problem
from opd_jax.data.seam import notes as prompt_notes
from opd_jax.data.seam import response_text
from opd_jax.data.source import Problems, open_problems, split_of
from opd_jax.data.tiny import problem
from opd_jax.data.tokenizer import Tokenizer

__all__ = [
    "Alignment",
    "Batch",
    "Problem",
    "Problems",
    "PromptStyle",
    "Tokenizer",
    "align",
    "alignment_report",
    "alone",
    "ends_line",
    "golden_rows",
    "make_batches",
    "named",
    "open_problems",
    "problem",
    "prompt_notes",
    "response_text",
    "split_of",
]
