"""Golden solutions that a teacher must read as the student does."""

import pytest

from opd_jax.data.length_filter import unread_misfit
from opd_jax.data.problem import Problem

pytestmark = pytest.mark.short

UNREAD = {7: "<|im_start|>"}


def fault(text: str, ids: list[int], *, response: int | None = None) -> str | None:
    problem = Problem(id="a", prompt="?", answer="", solution=text)
    found = unread_misfit(problem, lambda: ids, unread=UNREAD, response=response)
    return found and found[1]


def test_a_token_that_means_something_else_to_the_teacher_is_named():
    said = fault("one <|im_start|> two", [1, 7, 2])
    assert said is not None
    assert "holds '<|im_start|>', id 7, which means something else to the teacher" in said
    assert "--config.loss.golden_divergence=0" in said
    assert fault("one <|im_start|> two", [1, 4, 5, 2]) is None  # spelt in ordinary tokens


def test_the_teachers_own_prompt_leaves_room_for_the_budget_alone():
    said = fault("12345", [1] * 5, response=5)
    assert said is not None
    assert "has 6 tokens, its end included" in said
    assert said.endswith("--config.rollout.max_response_tokens=6")
    assert fault("12345", [1] * 5, response=6) is None
    assert fault("12345", [1] * 4, response=5) is None
    assert fault("12345", [1] * 50) is None  # the same rows: golden_misfit checks their width


def test_ids_are_asked_for_only_where_the_text_may_have_a_fault():
    def never() -> list[int]:
        raise AssertionError

    problem = Problem(id="a", prompt="?", answer="", solution="12345")
    assert unread_misfit(problem, never, unread=UNREAD, response=6) is None
    assert unread_misfit(problem, never, unread={}, response=None) is None
