"""Micro-batches by length: rows of similar length are processed together, in few fixed shapes.

Rows are sorted, longest first, and split into micro-batches of at most `tokens` tokens. Each is as wide
as its longest row, rounded up to a quarter of the full width; to a half in a small batch, where narrower
ones save less time than the compilation of their programs takes. So at most four shapes
are compiled, short rows are not padded to long ones, and the largest shape comes first. Where the teacher
reads rows of its own, both kinds are split at the same quarter of their widths. With a `tile` (on GPUs,
hardware.tile) every width is a multiple of it, and rows are padded where the full width is none.
"""

import dataclasses
import math
from typing import TypeVar

import jax
import numpy as np

from opd_jax.types import TeacherRows

Tree = TypeVar("Tree")
_SMALL = 16_384  # tokens of a batch at its full width up to which two widths are used


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The rows and shape of a micro-batch: `rows` (indices), padded with empty rows to `count`, of `width`.

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
    tile: int = 1,
    batch: int | None = None,
) -> list[MicroBatch]:
    """Split rows of the given lengths into micro-batches of at most `tokens` tokens (at least one row).

    With `replicas` this limit applies to each replica, and all of them have the same number of rows.

    `width` is that of the full batch. `teacher`, the teacher's own rows, counts as well: no
    micro-batch has more than `tokens` of its tokens either. The number of rows of a micro-batch of some
    width depends on the size of the batch alone, so that later batches have the same shapes. Rows whose
    number changes from step to step have those of `batch` rows, which `shapes` lists.
    """
    length_B = np.asarray(length_B)
    batch = len(length_B) if batch is None else batch
    teacher_width = 0 if teacher is None else teacher.tokens_BT.shape[1]
    quarters_B = _quarters(length_B, width, tile)
    if teacher is not None:
        quarters_B = np.maximum(quarters_B, _quarters(teacher.length_B, teacher_width, tile))
    step = _step(batch, max(width, teacher_width))
    quarters_B = -(-quarters_B // step) * step
    order = np.lexsort((-length_B, -quarters_B))
    parts = []
    start = 0
    while start < len(order):
        quarters = int(quarters_B[order[start]])
        shape = _shape(quarters, batch, width, teacher_width, tokens, replicas, tile)
        parts.append(dataclasses.replace(shape, rows=order[start : start + shape.count]))
        start += shape.count
    return parts


def shapes(
    batch: int, *, width: int, tokens: int, teacher_width: int = 0, replicas: int = 1, tile: int = 1
) -> list[MicroBatch]:
    """Return every micro-batch, without rows, into which `split` may divide `batch` rows of any lengths."""
    sizes = (batch, width, teacher_width, tokens, replicas, tile)
    step = _step(batch, max(width, teacher_width))
    parts = [_shape(quarters, *sizes) for quarters in range(4, 0, -step)]
    unique = {(part.count, part.width, part.teacher_width): part for part in parts}
    return list(unique.values())


def _step(batch: int, width: int) -> int:
    """Return how many quarters lie between two widths of micro-batches: 1, or 2 in a small batch."""
    return 2 if batch * width <= _SMALL else 1


def _shape(
    quarters: int, batch: int, width: int, teacher_width: int, tokens: int, replicas: int, tile: int
) -> MicroBatch:
    """The micro-batch of rows of so many quarters of the widths."""
    widths = [width_of(quarters, whole, tile) for whole in (width, teacher_width)]
    most = max(tokens // max(widths), 1) * replicas
    count = math.ceil(batch / math.ceil(batch / most))  # equal parts
    count = math.ceil(count / replicas) * replicas
    return MicroBatch(np.zeros(0, int), count, *widths)


def padded_lengths(length_B: np.ndarray, width: int, tile: int = 1) -> np.ndarray:
    """Return the width at which the rows of a batch go through a model: quarters or halves of `width`."""
    step = _step(len(length_B), width)
    quarters_B = -(-_quarters(length_B, width, tile) // step) * step
    return np.asarray([width_of(quarters, width, tile) for quarters in range(5)])[quarters_B]


def width_of(quarters: int, whole: int, tile: int = 1) -> int:
    """Return the tokens of so many quarters of a row of `whole` tokens, as a multiple of `tile`.

    A quarter is rounded up to the next multiple, and so is the limit: `whole`.
    """
    return min(_up(math.ceil(whole / 4), tile) * quarters, _up(whole, tile))


def _up(tokens: int, tile: int) -> int:
    return math.ceil(tokens / tile) * tile


def _quarters(length_B: np.ndarray, width: int, tile: int) -> np.ndarray:
    """Return how many quarters of `width`, rounded up to the tile, each row needs, 1 to 4."""
    quarter = max(width_of(1, width, tile), 1)
    return np.clip(np.ceil(np.asarray(length_B) / quarter), 1, 4).astype(int)


def gather(rows: Tree, part: MicroBatch) -> Tree:
    """Select the rows of a micro-batch from a tree of [B, T] and [B] host arrays."""

    def one(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        rows = x[part.rows] if x.ndim == 1 else x[part.rows, : part.width]
        blank = [(0, part.count - len(part.rows))] + [(0, 0)] * (x.ndim - 1)
        if x.ndim > 1 and x.shape[1] < part.width:  # the full width is no multiple of the tile
            blank[1] = (0, part.width - x.shape[1])
        return np.pad(rows, blank)

    return jax.tree.map(one, rows)


def gather_teacher(rows: TeacherRows, part: MicroBatch) -> TeacherRows:
    """Select the teacher's rows of a micro-batch."""
    return gather(rows, dataclasses.replace(part, width=part.teacher_width))


def scatter(out_BT: np.ndarray, values: jax.Array, part: MicroBatch) -> None:
    """Write a micro-batch's [count, width] values back to their rows of `out_BT`, without the padding."""
    width = min(part.width, out_BT.shape[1])
    out_BT[part.rows, :width] = np.asarray(values)[: len(part.rows), :width]
