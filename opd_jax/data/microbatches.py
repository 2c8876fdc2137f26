"""Micro-batches by length: rows of like length go through the models together, in few fixed shapes.

Rows are sorted, longest first, and cut into micro-batches of at most so many tokens; each is as wide
as its longest row needs, rounded up to a quarter of the whole width. Four shapes at most are ever
compiled, short rows do not pay for long ones, and the largest shape comes first. Where the teacher
reads rows of its own, both kinds are cut to the same quarter of their widths.
"""

import dataclasses
import math
from typing import TypeVar

import jax
import numpy as np

from opd_jax.types import TeacherRows

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Which rows, in what shape: `rows` (indices), filled up with empty rows to `count`, of `width`.

    `teacher_width` is that of the teacher's rows, where it has its own.
    """

    rows: np.ndarray
    count: int
    width: int
    teacher_width: int = 0


def split(
    length_B: np.ndarray,
    *,
    width: int,
    tokens: int,
    teacher: TeacherRows | None = None,
    replicas: int = 1,
) -> list[MicroBatch]:
    """Rows of the given lengths as micro-batches of at most `tokens` tokens (one row at least).

    With `replicas` that is the share of each, and all have as many rows.

    `width` is that of the whole batch. `teacher`, the teacher's own rows, counts as well: no
    micro-batch has more than `tokens` of its tokens either. How many rows a micro-batch of some width
    holds depends on the size of the batch alone, so that later batches meet the same shapes.
    """
    length_B = np.asarray(length_B)
    teacher_width = 0 if teacher is None else teacher.tokens_BT.shape[1]
    quarters_B = _quarters(length_B, width)
    if teacher is not None:
        quarters_B = np.maximum(quarters_B, _quarters(teacher.length_B, teacher_width))
    order = np.lexsort((-length_B, -quarters_B))
    parts = []
    start = 0
    while start < len(order):
        quarters = int(quarters_B[order[start]])
        shape = _shape(quarters, len(order), width, teacher_width, tokens, replicas)
        parts.append(dataclasses.replace(shape, rows=order[start : start + shape.count]))
        start += shape.count
    return parts


def shapes(
    batch: int, *, width: int, tokens: int, teacher_width: int = 0, replicas: int = 1
) -> list[MicroBatch]:
    """Every micro-batch, without rows, that `split` makes of `batch` rows of whatever lengths."""
    given = (batch, width, teacher_width, tokens, replicas)
    found = [_shape(quarters, *given) for quarters in (4, 3, 2, 1)]
    unique = {(part.count, part.width, part.teacher_width): part for part in found}
    return list(unique.values())


def _shape(
    quarters: int, batch: int, width: int, teacher_width: int, tokens: int, replicas: int
) -> MicroBatch:
    """The micro-batch of rows of so many quarters of the widths."""
    widths = [_width(quarters, whole) for whole in (width, teacher_width)]
    most = max(tokens // max(widths), 1) * replicas
    count = math.ceil(batch / math.ceil(batch / most))  # even shares
    count = math.ceil(count / replicas) * replicas
    return MicroBatch(np.zeros(0, int), count, *widths)


def padded_lengths(length_B: np.ndarray, width: int) -> np.ndarray:
    """Return the width at which rows of these lengths go through a model: quarters of `width`."""
    return np.asarray([_width(quarters, width) for quarters in range(5)])[
        _quarters(length_B, width)
    ]


def _width(quarters: int, whole: int) -> int:
    """Return the tokens of so many quarters of a row of `whole` tokens."""
    return min(math.ceil(whole / 4) * quarters, whole)


def _quarters(length_B: np.ndarray, width: int) -> np.ndarray:
    """How many quarters of `width` hold each row, 1 to 4."""
    return np.clip(np.ceil(np.asarray(length_B) / math.ceil(width / 4)), 1, 4).astype(int)


def gather(rows: Tree, part: MicroBatch) -> Tree:
    """The rows of a tree of [B, T] and [B] host arrays that make up a micro-batch."""

    def one(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        taken = x[part.rows] if x.ndim == 1 else x[part.rows, : part.width]
        return np.pad(taken, [(0, part.count - len(part.rows))] + [(0, 0)] * (x.ndim - 1))

    return jax.tree.map(one, rows)


def gather_teacher(rows: TeacherRows, part: MicroBatch) -> TeacherRows:
    """The teacher's rows of a micro-batch."""
    return gather(rows, dataclasses.replace(part, width=part.teacher_width))


def scatter(out_BT: np.ndarray, values: jax.Array, part: MicroBatch) -> None:
    """Put a micro-batch's [count, width] values back into their rows of `out_BT`."""
    out_BT[part.rows, : part.width] = np.asarray(values)[: len(part.rows)]
