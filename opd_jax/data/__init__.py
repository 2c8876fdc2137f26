"""Problems, prompts and golden solutions as token ids."""

from opd_jax.data.arithmetic import TEST_SIZE, problem
from opd_jax.data.batches import Batch, make_batches
from opd_jax.data.dataset import Problems, open_problems, split_of
from opd_jax.data.problem import Problem
from opd_jax.data.prompts import PromptStyle, golden_rows
from opd_jax.data.spans import Reader, align_text
from opd_jax.data.spans import report as spans_report
from opd_jax.data.template_boundary import notes as prompt_notes
from opd_jax.data.template_boundary import response_text
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.data.vocabulary import (
    Alignment,
    Vocabulary,
    align,
    alone,
    ends_line,
    named,
    share_ids,
)
from opd_jax.data.vocabulary import report as alignment_report

__all__ = [
    "TEST_SIZE",
    "Alignment",
    "Batch",
    "Problem",
    "Problems",
    "PromptStyle",
    "Reader",
    "Tokenizer",
    "Vocabulary",
    "align",
    "align_text",
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
    "share_ids",
    "spans_report",
    "split_of",
]
