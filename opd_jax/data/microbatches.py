"""Micro-batches by length: rows of similar length are processed together, in few fixed shapes.

Rows are sorted, longest first, and split into micro-batches of at most `tokens` tokens. Each is as wide
as its longest row, rounded up to a quarter of the full width; to a half in a small batch, where narrower
ones save less time than the compilation of their programs takes, and to an eighth in a large one. So at
most four shapes are compiled, or eight, short rows are not padded to long ones, and the largest shape comes
first. Where the teacher reads rows of its own, both kinds are split at the same part of their widths. With
a `tile` (on GPUs, hardware.tile) every width is a multiple of it, and rows are padded where the full width
is none.
"""

import dataclasses
import math
from typing import TypeVar

import jax
import numpy as np

from opd_jax.types import TeacherRows

Tree = TypeVar("Tree")
# Tokens of a batch at its full width: up to the first number two widths are used, from the second on eight.
_SMALL, _LARGE = 16_384, 2**20


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
    of, step = _division(batch, max(width, teacher_width))
    part_B = _part(length_B, width, tile, of)
    if teacher is not None:
        part_B = np.maximum(part_B, _part(teacher.length_B, teacher_width, tile, of))
    part_B = -(-part_B // step) * step
    order = np.lexsort((-length_B, -part_B))
    parts = []
    start = 0
    while start < len(order):
        part = int(part_B[order[start]])
        shape = _shape(part, of, batch, width, teacher_width, tokens, replicas, tile)
        parts.append(dataclasses.replace(shape, rows=order[start : start + shape.count]))
        start += shape.count
    return parts


def shapes(
    batch: int, *, width: int, tokens: int, teacher_width: int = 0, replicas: int = 1, tile: int = 1
) -> list[MicroBatch]:
    """Return every micro-batch, without rows, into which `split` may divide `batch` rows of any lengths."""
    sizes = (batch, width, teacher_width, tokens, replicas, tile)
    of, step = _division(batch, max(width, teacher_width))
    parts = [_shape(part, of, *sizes) for part in range(of, 0, -step)]
    unique = {(part.count, part.width, part.teacher_width): part for part in parts}
    return list(unique.values())


def _division(batch: int, width: int) -> tuple[int, int]:
    """Return into how many parts rows are divided, and how many parts lie between two widths."""
    if batch * width <= _SMALL:
        return 4, 2
    return (8, 1) if batch * width >= _LARGE else (4, 1)


def _shape(
    part: int,
    of: int,
    batch: int,
    width: int,
    teacher_width: int,
    tokens: int,
    replicas: int,
    tile: int,
) -> MicroBatch:
    """The micro-batch of rows of so many parts `of` the widths."""
    widths = [width_of(part, whole, tile, of) for whole in (width, teacher_width)]
    most = max(tokens // max(widths), 1) * replicas
    count = math.ceil(batch / math.ceil(batch / most))  # equal parts
    count = math.ceil(count / replicas) * replicas
    return MicroBatch(np.zeros(0, int), count, *widths)


def padded_lengths(
    length_B: np.ndarray, width: int, tile: int = 1, *, replicas: int = 1
) -> np.ndarray:
    """Return the width at which these rows go through a model; the batch has `replicas` times as many."""
    of, step = _division(len(length_B) * replicas, width)
    part_B = -(-_part(length_B, width, tile, of) // step) * step
    return np.asarray([width_of(part, width, tile, of) for part in range(of + 1)])[part_B]


def width_of(part: int, whole: int, tile: int = 1, of: int = 4) -> int:
    """Return the tokens of so many parts, by default quarters, of a row of `whole` tokens.

    It is a multiple of `tile`: a part is rounded up to the next multiple, and so is the limit, `whole`.
    """
    return min(_up(math.ceil(whole / of), tile) * part, _up(whole, tile))


def _up(tokens: int, tile: int) -> int:
    return math.ceil(tokens / tile) * tile


def _part(length_B: np.ndarray, width: int, tile: int, of: int) -> np.ndarray:
    """Return how many parts of `width`, rounded up to the tile, each row needs, 1 to `of`."""
    one = max(width_of(1, width, tile, of), 1)
    return np.clip(np.ceil(np.asarray(length_B) / one), 1, of).astype(int)


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
