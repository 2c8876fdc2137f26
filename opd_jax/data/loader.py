"""Batches of problems by Grain, and what the models are shown of them: prompts and golden rows."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from opd_jax.data.problem import History, Problem
from opd_jax.data.seam import golden_ids
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a problem is put to a model.

    Attributes:
      template: text of the last user's turn; {problem}, {answer} and {solution} are filled in.
      system: text of the system's turn; "" for the problem's own, if it has one, "none" for none.
    """

    template: str = "{problem}"
    system: str = ""

    def turns(self, problem: Problem) -> tuple[str, str, History]:
        """The texts of the last user's and of the system's turn, and the turns between them."""
        fields = {
            "problem": problem.prompt, "answer": problem.answer, "solution": problem.solution,
        }  # fmt: skip
        text = re.sub(r"\{(problem|answer|solution)\}", lambda m: fields[m[1]], self.template)
        system = "" if self.system == "none" else self.system or problem.system
        return text, system, problem.history

    def texts(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[str]:
        """Rendered prompt of each problem, through the tokenizer's chat template."""
        return [
            tokenizer.render(text, system=system, history=history)
            for text, system, history in map(self.turns, problems)
        ]

    def prompts(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
        """Prompt ids of each problem, through the tokenizer's chat template."""
        return tokenizer.chats([self.turns(problem) for problem in problems])

    def golden(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
        """Ids of each golden solution behind its prompt, no end token added; see seam.py."""
        solutions = [problem.solution for problem in problems]
        return golden_ids(tokenizer, self.texts(problems, tokenizer), solutions)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step's problems as the models read them.

    Attributes:
      prompts: ids of each problem for the student. teacher_prompts: for the teacher, where it is shown
        others; None where not.
      golden: ids of each golden solution, an end token last; [] where no term asks for them.
    """

    problems: list[Problem]
    prompts: list[list[int]]
    teacher_prompts: list[list[int]] | None
    golden: list[list[int]]


def make_batches(
    problems: Sequence[Problem],
    *,
    batch: int,
    seed: int,
    shuffle: bool,
    read: Callable[[list[Problem]], Any] = list,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Endless batches, each what `read` makes of a list of `Problem`, two of them ahead of time.

    Reading (tokenising) goes on in a thread beside the steps. The iterator's state, which goes into
    checkpoints, is that of the last batch taken, whatever has been read ahead.

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
    batches = mine.batch(batch // count, drop_remainder=True, batch_fn=list).map(read)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.to_iter_dataset(ahead))


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
