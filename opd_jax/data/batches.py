"""Batches of problems, read ahead by Grain."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from opd_jax.data.problem import Problem

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step's problems as the models read them.

    Attributes:
      prompts: ids of each problem for the student. teacher_prompts: for the teacher, where it is shown
        others; None where not.
      golden: ids of each golden solution, an end token last; [] where no term asks for them.
      harness_texts: what the student wrote into the teacher's prompt of each problem; None without a harness.
    """

    problems: list[Problem]
    prompts: list[list[int]]
    teacher_prompts: list[list[int]] | None
    golden: list[list[int]]
    harness_texts: list[str] | None = None


def make_batches(
    problems: Sequence[Any],
    *,
    batch: int,
    seed: int,
    shuffle: bool,
    read: Callable[[list[Any]], Any] = list,
    order: Sequence[int] | None = None,
) -> "grain.DatasetIterator":
    """Endless batches, each what `read` makes of a list of `Problem`, two of them ahead of time.

    Reading (tokenising) goes on in a thread beside the steps. The iterator's state, which goes into
    checkpoints, is that of the last batch taken, whatever has been read ahead.

    Every epoch visits each problem once, in an order of its own drawn from the seed; batches run on
    over the end of an epoch. Every process reads whole batches; its devices take their rows of them.
    `order` are the places of the problems to visit instead, again and again; nothing is drawn then.
    """
    import grain  # only here: benchmarks of the models run where it is not installed

    dataset = grain.MapDataset.range(len(problems)).seed(seed)
    if order is not None:
        dataset = grain.MapDataset.source(list(order))
    elif shuffle:
        dataset = dataset.shuffle()
    endless = dataset.repeat().map(lambda i: problems[int(i)])
    batches = endless.batch(batch, drop_remainder=True, batch_fn=list).map(read)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.to_iter_dataset(ahead))
