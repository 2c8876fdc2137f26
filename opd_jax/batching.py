"""Micro-batches by length: rows of like length go through the models together, in few fixed shapes.

Rows are sorted, longest first, and cut into micro-batches of at most so many tokens; each is as wide
as its longest row needs, rounded up to a quarter of the whole width. Four shapes at most are ever
compiled, short rows do not pay for long ones, and the largest shape comes first.
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
    """Which rows, in what shape: `rows` (indices), filled up with empty rows to `count`, of `width`."""

    rows: np.ndarray
    count: int
    width: int


def bucket(longest: int, width: int) -> int:
    """The least quarter of `width` that holds a row of `longest` tokens."""
    quarter = math.ceil(width / 4)
    return min(quarter * max(math.ceil(longest / quarter), 1), width)


def split(length_B: np.ndarray, *, width: int, tokens: int) -> list[MicroBatch]:
    """Rows of the given lengths as micro-batches of at most `tokens` tokens (one row at least).

    How many rows a micro-batch of some width holds depends on the size of the batch alone, so that
    later batches of that size meet the same shapes.
    """
    order = np.argsort(-np.asarray(length_B), kind="stable")
    parts = []
    start = 0
    while start < len(order):
        of_part = bucket(int(length_B[order[start]]), width)
        most = max(tokens // of_part, 1)
        count = math.ceil(len(order) / math.ceil(len(order) / most))  # even shares
        parts.append(MicroBatch(order[start : start + count], count, of_part))
        start += count
    return parts


def gather(rows: Tree, part: MicroBatch) -> Tree:
    """The rows of a tree of [B, T] and [B] host arrays that make up a micro-batch."""

    def one(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        taken = x[part.rows] if x.ndim == 1 else x[part.rows, : part.width]
        return np.pad(taken, [(0, part.count - len(part.rows))] + [(0, 0)] * (x.ndim - 1))

    return jax.tree.map(one, rows)


def gather_teacher(rows: TeacherRows, part: MicroBatch) -> TeacherRows:
    """The teacher's rows of a micro-batch, as wide as their own longest needs."""
    width = bucket(int(np.max(rows.length_B[part.rows])), rows.tokens_BT.shape[1])
    return gather(rows, dataclasses.replace(part, width=width))


def scatter(out_BT: np.ndarray, values: jax.Array, part: MicroBatch) -> None:
    """Put a micro-batch's [count, width] values back into their rows of `out_BT`."""
    out_BT[part.rows, : part.width] = np.asarray(values)[: len(part.rows)]
