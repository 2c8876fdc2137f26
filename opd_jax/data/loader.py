"""Batches of problems by Grain, and what the models are shown of them: prompts and golden rows."""

import dataclasses
import re
from collections.abc import Sequence

import grain
import numpy as np

from opd_jax.data.problem import Problem
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a problem is put to a model.

    Attributes:
      template: text of the user's turn; {problem}, {answer} and {solution} are filled in.
      system: text of the system's turn; "" for the problem's own, if it has one, "none" for none.
    """

    template: str = "{problem}"
    system: str = ""

    def turns(self, problem: Problem) -> tuple[str, str]:
        """The texts of the user's and the system's turn."""
        fields = {
            "problem": problem.prompt, "answer": problem.answer, "solution": problem.solution,
        }  # fmt: skip
        text = re.sub(r"\{(problem|answer|solution)\}", lambda m: fields[m[1]], self.template)
        return text, "" if self.system == "none" else self.system or problem.system

    def prompts(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
        """Prompt ids of each problem, through the tokenizer's chat template."""
        return tokenizer.chats([self.turns(problem) for problem in problems])


def make_batches(
    problems: Sequence[Problem],
    *,
    batch: int,
    seed: int,
    shuffle: bool,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Endless batches (lists of `Problem`); the iterator's state goes into checkpoints.

    Every epoch visits each problem once, in an order of its own drawn from the seed; batches run on
    over the end of an epoch. `shard` = (index, count) takes this process's part of every batch of
    `batch` problems, so that the processes together see what one process alone would see.

    Raises DataError where the batch does not divide among the processes.
    """
    index, count = shard
    if batch % count:
        raise DataError(
            f"rollout.prompts_per_step={batch} does not divide among {count} processes; "
            f"set --config.rollout.prompts_per_step={-(-batch // count) * count}"
        )
    dataset = grain.MapDataset.range(len(problems)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    mine = dataset.repeat()[index::count].map(lambda i: problems[int(i)])
    return iter(mine.batch(batch // count, drop_remainder=True, batch_fn=list).to_iter_dataset())


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
