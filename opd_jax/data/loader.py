"""Batches of problems by Grain: one global shuffle from the seed, and an iterator that checkpoints."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from opd_jax.data import tiny
from opd_jax.data.problem import Problem
from opd_jax.data.source import split_of
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError


def make_batches(section: Any, *, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless batches (lists of `Problem`) from the config section `data`.

    Every epoch visits each problem once, in an order of its own drawn from the seed.
    """
    split = split_of(section.train, field="data.train")
    dataset = grain.MapDataset.range(section.size).seed(seed)
    if section.shuffle:
        dataset = dataset.shuffle()
    problems = dataset.repeat().map(lambda index: tiny.problem(split, int(index)))
    return iter(problems.batch(batch, drop_remainder=True, batch_fn=list).to_iter_dataset())


def prompt_ids(problem: Problem, tokenizer: Tokenizer, section: Any, limit: int) -> list[int]:
    """Prompt of a problem through the chat template. Raises DataError where it exceeds `limit`."""
    ids = tokenizer.chat(
        problem.prompt, template=section.prompt_template, system=section.system_prompt
    )
    if not 1 <= len(ids) <= limit:
        raise DataError(
            f"problem {problem.id}: its prompt has {len(ids)} tokens, wanted 1 to "
            f"rollout.max_prompt_tokens={limit}; set --config.rollout.max_prompt_tokens={len(ids)}"
        )
    return ids


def golden_rows(
    prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], *, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded rows of prompt ++ solution (its end token included).

    Returns tokens [B, width] int32, length [B] int32, and the mask of solution tokens [B, width].
    Raises DataError for a row that does not fit.
    """
    tokens = np.zeros((len(prompts), width), np.int32)
    length = np.zeros(len(prompts), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for i, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        row = [*prompt, *solution]
        if len(row) > width:
            raise DataError(
                f"golden row {i}: prompt and solution have {len(row)} tokens, more than {width}; "
                "raise --config.rollout.max_response_tokens"
            )
        tokens[i, : len(row)], length[i] = row, len(row)
        mask[i, len(prompt) : len(row)] = True
    return tokens, length, mask
