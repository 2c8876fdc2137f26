"""The record of a problem, independent of its source."""

import dataclasses
from typing import Any

History = tuple[tuple[str, str], ...]  # (role, text) of turns, in order


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: `prompt` text, `solution` (golden) text, `answer`, and a stable `id`.

    `solution` and `answer` are "" where the source has none; `system` is the text of a system turn
    that the source prescribes for this problem, "" for none. `history` holds (role, text) of the turns
    between the two: user's and assistant's. `columns` holds (name, text) of further columns of the row,
    those that a prompt template shows. `fields` is the row itself, None for generated problems.
    """

    id: str
    prompt: str
    solution: str
    answer: str
    system: str = ""
    history: History = ()
    columns: tuple[tuple[str, str], ...] = ()
    fields: dict[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def question(self) -> str:
        """The text of all turns except the system's, which identifies duplicates."""
        return "\n".join([*(text for _, text in self.history), self.prompt])

    def reward_row(self) -> dict[str, Any]:
        """Return what a reward function reads: the row, with id, problem, solution and answer as read."""
        return (self.fields or {}) | {
            "id": self.id, "problem": self.prompt, "solution": self.solution, "answer": self.answer,
        }  # fmt: skip

    def row(self) -> dict[str, Any]:
        """Return the row of a file that `data.open_problems` reads as this problem."""
        row: dict[str, Any] = dict(self.columns) | {
            "id": self.id, "problem": self.prompt, "solution": self.solution, "answer": self.answer,
        }  # fmt: skip
        if self.system:
            row["system"] = self.system
        if self.history:
            row["history"] = [{"role": role, "content": text} for role, text in self.history]
        return row
