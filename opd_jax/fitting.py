"""Problems that fit their budgets: what is too long is refused by name, or left out and counted."""

from collections.abc import Callable

from opd_jax import data, models
from opd_jax.errors import DataError

# Why a problem cannot be used: in short, for the count, and in a sentence that ends with the fix.
Misfit = tuple[str, str]
_BLOCK = 1024  # problems tokenised at one time


def without_misfits(
    problems: data.Problems,
    misfits: Callable[[list[data.Problem]], list[Misfit | None]],
    *,
    field: str,
    count: int,
    skip: bool,
) -> data.Problems:
    """The problems less those of the first `count` in which `misfits` finds something wrong.

    `misfits` is called on blocks, in order. Raises DataError at the first misfit, unless `skip`.
    """
    bad: dict[str, list[int]] = {}
    for start in range(0, count, _BLOCK):
        block = problems[start : min(start + _BLOCK, count)]
        for i, misfit in enumerate(misfits(block)):
            if misfit is None:
                continue
            if not skip:
                raise DataError(
                    f"{field}: problem {block[i].id}: {misfit[1]}; or leave such rows out: "
                    "--config.data.bad_rows=skip"
                )
            bad.setdefault(misfit[0], []).append(start + i)
    return problems.without(bad) if bad else problems


def prompt_misfit(tokens: int, limit: int) -> Misfit | None:
    """What is wrong with a prompt of so many tokens under rollout.max_prompt_tokens = `limit`."""
    if tokens < 1:
        return "empty prompt", "its prompt is empty; correct --config.data.prompt_template"
    if tokens > limit:
        return (
            "prompt too long",
            f"its prompt has {tokens} tokens, wanted at most rollout.max_prompt_tokens={limit}; "
            f"set --config.rollout.max_prompt_tokens={tokens}",
        )
    return None


def teacher_misfit(tokens: int, teacher: models.ModelConfig, response: int) -> Misfit | None:
    """What is wrong with a teacher's prompt of so many tokens beside `response` tokens."""
    room = teacher.max_position - response
    if tokens > room:
        return (
            "teacher's prompt too long",
            f"the teacher's prompt has {tokens} tokens, wanted at most {room} beside the response; "
            f"set --config.teacher.max_position={tokens + response}",
        )
    return None
