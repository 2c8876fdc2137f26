"""Prompts and golden rows: problems as token ids."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.data import templates
from opd_jax.data.problem import History, Problem
from opd_jax.data.template_boundary import golden_ids
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a problem is presented to a model.

    Attributes:
      template: text of the last user turn, filled in by `templates.fill`.
      system: text of the system turn; "" for the problem's own, if it has one, "none" for none.
    """

    template: str = "{problem}"
    system: str = ""

    def turns(self, problem: Problem) -> tuple[str, str, History]:
        """Return the texts of the last user turn and of the system turn, and the turns between them."""
        parts = {
            "problem": problem.prompt, "answer": problem.answer, "solution": problem.solution,
        }  # fmt: skip
        text = templates.fill(self.template, dict(problem.columns) | parts)
        system = "" if self.system == "none" else self.system or problem.system
        return text, system, problem.history

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a row that the template shows beside problem, answer and solution."""
        return templates.columns_of(self.template)

    def texts(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[str]:
        """Render the prompt of each problem with the tokenizer's chat template."""
        return [
            tokenizer.render(text, system=system, history=history)
            for text, system, history in map(self.turns, problems)
        ]

    def prompts(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
        """Return the prompt ids of each problem, with the tokenizer's chat template."""
        return tokenizer.chats([self.turns(problem) for problem in problems])

    def golden(self, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
        """Return the ids of each golden solution after its prompt, without end token.

        See template_boundary.py.
        """
        solutions = [problem.solution for problem in problems]
        return golden_ids(tokenizer, self.texts(problems, tokenizer), solutions)


def golden_rows(
    prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], *, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build right-padded rows of prompt ++ solution (its end token included).

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
