"""Scores of several teachers joined: each on its own rows, or all on every row. Host arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax.losses import teachers
from opd_jax.types import Scores

# Fields that are the same whichever teacher scores along with the student.
_OF_ALL = ("student_logprob_BT", "student_entropy_BT", "reference_logprob_BT")


def routed(parts: Sequence[tuple[np.ndarray, Scores]], *, batch: int) -> Scores:
    """Return the scores of `batch` rows, each from the teacher that it names.

    `parts` has, of every teacher that is named, the indices of its rows and their scores; no row is in two.
    """
    rows = np.concatenate([rows for rows, _ in parts])
    assert len(rows) == batch == len(np.unique(rows)), "every row has one teacher"

    def joined(*leaves: Any) -> np.ndarray:
        out = np.zeros((batch, *leaves[0].shape[1:]), leaves[0].dtype)
        out[rows] = np.concatenate(leaves)
        return out

    return jax.tree.map(joined, *(scores for _, scores in parts))


def mixed(found: Sequence[Scores], share_K: np.ndarray) -> Scores:
    """Return the scores of a mixture: of every statistic of a teacher the weighted mean (losses.teachers).

    `found` has the scores of all rows by each teacher in turn. The student's are those of the first.
    """
    first = found[0]
    assert first.support is None, "support: a mixture has none"
    assert first.teacher_hidden_BTD is None, "teacher_hidden_BTD: a mixture has none"
    means = {
        field.name: teachers.mixture(
            values_KBT=[getattr(scores, field.name) for scores in found], share_K=share_K
        )
        for field in dataclasses.fields(Scores)
        if getattr(first, field.name) is not None and field.name not in _OF_ALL
    }
    return first.replace(**means)
