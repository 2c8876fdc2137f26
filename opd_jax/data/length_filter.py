"""Length filter: reject, or drop and count, problems whose prompt or solution exceeds its token budget."""

from collections.abc import Callable, Mapping, Sequence

from opd_jax import data
from opd_jax.data import template_boundary
from opd_jax.errors import DataError, ModelError

# Why a problem cannot be used: a short form for the count, and a sentence that ends with the fix.
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
    """Return the problems without those of the first `count` for which `misfits` returns a reason.

    `misfits` is called on blocks, in order. Where it raises ModelError, because a chat template refuses the
    turns of a row, that row is a misfit. Raises DataError at the first misfit, unless `skip`.
    """

    def each(block: list[data.Problem]) -> list[Misfit | None]:
        try:
            return misfits(block)
        except (
            ModelError
        ) as error:  # about one row's turns, or about turns that the config adds to all
            if not any(problem.system or problem.history for problem in block):
                raise
            if len(block) == 1:
                return [("template refuses the turns", str(error))]
            return [misfit for problem in block for misfit in each([problem])]

    bad: dict[str, list[int]] = {}
    for start in range(0, count, _BLOCK):
        block = problems[start : min(start + _BLOCK, count)]
        for i, misfit in enumerate(each(block)):
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
    """Return the fault of a prompt of `tokens` tokens, where rollout.max_prompt_tokens = `limit`."""
    if tokens < 1:
        return "empty prompt", "its prompt is empty; correct --config.data.prompt_template"
    if tokens > limit:
        return (
            "prompt too long",
            f"its prompt has {tokens} tokens, wanted at most rollout.max_prompt_tokens={limit}; "
            f"set --config.rollout.max_prompt_tokens={tokens}",
        )
    return None


def teacher_misfit(tokens: int, max_position: int, response: int) -> Misfit | None:
    """Return the fault of a teacher's prompt of `tokens` tokens, followed by `response` tokens."""
    room = max_position - response
    if tokens > room:
        return (
            "teacher's prompt too long",
            f"the teacher's prompt has {tokens} tokens, wanted at most {room} before the response; "
            f"set --config.teacher.max_position={tokens + response}",
        )
    return None


def harness_misfit(tokens: int, limit: int) -> Misfit | None:
    """Return the fault of a prompt to which the student writes, where harness.max_prompt_tokens = `limit`."""
    if tokens > limit:
        return (
            "harness prompt too long",
            f"its prompt of harness.prompt has {tokens} tokens, wanted at most harness.max_prompt_tokens="
            f"{limit}; set --config.harness.max_prompt_tokens={tokens}",
        )
    return None


def unknown_id(
    ids: Sequence[int], tokenizer: data.Tokenizer, *, what: str, rows: dict[str, int]
) -> Misfit | None:
    """Return the fault of token ids that some model has no embedding for.

    `what` names the text of the ids; `rows` is the number of rows of the embedding, by role.
    """
    largest = max(ids, default=0)
    role = min(rows, key=rows.__getitem__)
    if largest < rows[role]:
        return None
    token = tokenizer.hf.convert_ids_to_tokens(largest)
    return (
        f"{what} with an unknown id",
        f"its {what} holds {token!r}, id {largest}, wanted ids below {rows[role]}, the rows of the "
        f"{role}'s embedding; remove the token from the data or the chat template, or use a {role} "
        "with a row for it",
    )


def unread_misfit(
    problem: data.Problem,
    ids: Callable[[], Sequence[int]],
    *,
    unread: Mapping[int, str],
    response: int | None,
) -> Misfit | None:
    """Return the fault of a golden solution that the teacher must read as the student does.

    `unread` has the tokens, by id, that mean something else to the teacher. `response` is the budget that
    both share where the teacher reads rows of its own (rollout.max_response_tokens), else None. `ids` returns
    the solution's ids; it is called only where the text could have a fault.
    """
    text = problem.solution
    long = response is not None and len(text.encode()) + 1 > response
    if not long and not any(token in text for token in unread.values()):
        return None
    solution = ids()
    if found := next((i for i in solution if i in unread), None):
        return (
            "golden solution that the teacher reads otherwise",
            f"its golden solution holds {unread[found]!r}, id {found}, which means something else to the "
            "teacher; remove the token from the data, or set --config.loss.golden_divergence=0",
        )
    if response is not None and len(solution) + 1 > response:
        return (
            "golden solution too long",
            f"its golden solution has {len(solution) + 1} tokens, its end included, wanted at most "
            f"rollout.max_response_tokens={response}, the room after the teacher's own prompt; set "
            f"--config.rollout.max_response_tokens={len(solution) + 1}",
        )
    return None


def golden_misfit(
    problem: data.Problem,
    prompt: str,
    size: int,
    style: data.PromptStyle,
    tokenizer: data.Tokenizer,
    *,
    rows: int,
    width: int,
    response: int,
) -> Misfit | None:
    """Return the fault of a golden solution after its prompt, a rendered text of `size` tokens.

    `rows` is the number of rows of the student's embedding; `width` is the number of tokens of a row, of
    which `response` are rollout.max_response_tokens.
    """
    begun = template_boundary.opening(prompt, closed=tokenizer.has_template)
    if fault := template_boundary.fault(problem.solution, begun):
        return fault
    room = width - size
    # No token is shorter than a byte, and most models have a row for every id of their tokenizer.
    if len(problem.solution.encode()) + 1 < room and tokenizer.size <= rows:
        return None
    ids = style.golden([problem], tokenizer)[0]
    if misfit := unknown_id(ids, tokenizer, what="golden solution", rows={"student": rows}):
        return misfit
    over = len(ids) + 1 - room
    if over > 0:
        return (
            "golden solution too long",
            f"its prompt and golden solution have {width + over} tokens, wanted at most {width} "
            "(rollout.max_prompt_tokens + rollout.max_response_tokens); set "
            f"--config.rollout.max_response_tokens={response + over}",
        )
    return None
