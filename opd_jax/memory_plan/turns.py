"""Several teachers in a plan: which of them are held, and how many rows each of them scores at one time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from opd_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Turns:
    """Further teachers, which score in turn with the first one.

    Attributes:
      others: their architectures.
      shared: whether each has the weights of a teacher before it.
      routed: whether each row has one teacher; else all teachers score all rows.
      wait: whether teachers wait in host memory between their turns.
    """

    others: tuple[ModelConfig, ...] = ()
    shared: tuple[bool, ...] = ()
    routed: bool = False
    wait: bool = False

    @property
    def held(self) -> tuple[ModelConfig, ...]:
        """The architectures of those with weights of their own."""
        pairs = zip(self.others, self.shared, strict=True)
        return tuple(model for model, shared in pairs if not shared)

    def together(self, rows: int) -> int:
        """Return of how many rows the micro-batches of scoring are made (StepSpec.scored_together)."""
        return -(-rows // (1 + len(self.others))) if self.routed else rows


ONE_TEACHER = Turns()


def make_turns(section: Any, first: str, others: Sequence[tuple[str, ModelConfig]]) -> Turns:
    """Return the turns of the config section `teachers`.

    `first` is the path of the first teacher, `others` are the paths and architectures of the others.
    """
    paths = [first, *(path for path, _ in others)]
    return Turns(
        others=tuple(model for _, model in others),
        shared=tuple(path in paths[: i + 1] for i, (path, _) in enumerate(others)),
        routed=bool(others and section.column),
        wait=bool(others) and section.wait == "host",
    )
