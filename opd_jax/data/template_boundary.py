r"""The boundary between a prompt and its response: thoughts that the prompt opens, and ids across it.

A generation prompt may begin the response itself. R1's ends in `<think>\n`, so that a response continues
inside thoughts which it never opens; Qwen3's without thinking ends in an empty block,
`<think>\n\n</think>\n\n`. This text is the *opening* of the response:

- a golden solution that begins with the opening is trained on without it, because the prompt has it;
- a response after an open one is written with it, so that the text is complete on its own.
"""

import re
from collections.abc import Sequence

from opd_jax.data.tokenizer import Tokenizer

_NAMES = r"(?:seed:)?think(?:ing)?|thoughts?|reason(?:ing)?"
_TAG = re.compile(rf"<(/?)({_NAMES})>|\[(/?)(THINK)\]")
_OPENING = re.compile(rf"(?:<({_NAMES})>|\[(THINK)\])\s*\Z")
_CLOSED = re.compile(rf"<({_NAMES})>[^<]*</\1>\s*\Z|\[(THINK)\][^\[]*\[/THINK\]\s*\Z")
_PIECE = re.compile(r"<[^<>\s]*>|\[/?THINK\]|[^\s<\[]+")
_LAST = 48  # ids at the end of a prompt that may contain an opening
_ANCHOR = "0"  # a text whose token never merges with the next text

Fault = tuple[str, str]  # a short form for the count, and a sentence that ends with the fix


def opening(prompt: str, *, closed: bool = True) -> str:
    r"""Return the end of a prompt's text that belongs to the response: `<think>\n`, or "".

    With `closed` this may also be a block of thoughts that the prompt has closed again.
    """
    match = _OPENING.search(prompt) or (_CLOSED.search(prompt) if closed else None)
    return match[0] if match else ""


def is_open(text: str) -> bool:
    """Return whether an opening leaves its thoughts open."""
    return bool(_OPENING.fullmatch(text))


def remainder(solution: str, begun: str) -> str:
    """Return the rest of a solution after a prompt that has begun it with the opening `begun`."""
    if begun and solution.startswith(begun):
        return solution[len(begun) :]
    # The same pieces with other white space around them.
    head = re.match(r"\s*" + r"\s*".join(map(re.escape, _PIECE.findall(begun))), solution)
    return solution[head.end() :].lstrip() if begun and head else solution


def fault(solution: str, begun: str) -> Fault | None:
    """Return why a solution cannot follow a prompt that has begun it with `begun`; None if it can."""
    rest = remainder(solution, begun)
    opened = begun.strip() if is_open(begun) else ""  # the tag of the thoughts that are open
    if opened and opened.replace("<", "</").replace("[", "[/") not in rest:
        return (
            "golden solution without thoughts",
            f"the prompt ends in {begun!r}, and its golden solution never closes these thoughts; "
            "give solutions with thoughts, or a template that does not open them: "
            "--config.student.chat_template=FILE, or --config.student.enable_thinking=False "
            "where it knows that",
        )
    for match in _TAG.finditer(rest):
        tag, opens = match[0], match[0].replace("/", "")
        if opened and opens != opened:
            continue  # a text inside the thoughts
        if opened and tag == opened:
            return (
                "golden solution that opens thoughts twice",
                f"its golden solution opens {tag} where it or the prompt has opened it already; "
                f"remove one of the two {tag}",
            )
        if tag != opens and not opened:
            return (
                "golden solution of unopened thoughts",
                f"its golden solution closes {tag}, which neither it nor the prompt opens before "
                f"it; begin it with {opens}, or name a template that opens it: "
                "--config.student.chat_template=FILE",
            )
        if begun and tag == opens and not is_open(begun):
            return (
                "golden solution with thoughts",
                f"the prompt ends in {begun!r}, and its golden solution opens {tag} again; give "
                "solutions without thoughts, or set --config.student.enable_thinking=True",
            )
        opened = opens if tag == opens else ""
    if opened:
        return (
            "golden solution of unclosed thoughts",
            f"its golden solution opens {opened} and never closes it; close it, or remove it",
        )
    return None


def golden_ids(
    tokenizer: Tokenizer, prompts: Sequence[str], solutions: Sequence[str]
) -> list[list[int]]:
    """Return the ids of solutions as they follow their prompts (rendered texts), without end token.

    They are the ids that the text of prompt and solution together has, so a SentencePiece tokenizer
    puts no space before a solution that follows a line feed. Where a token would span the boundary, the
    solution gets the ids that it has after any other text.
    """
    space = tokenizer.reply_space
    rests = []
    for prompt, solution in zip(prompts, solutions, strict=True):
        begun = opening(prompt, closed=tokenizer.has_template)
        rests.append(space + remainder(solution, begun))
    before = tokenizer.encode_all(list(prompts))
    both = tokenizer.encode_all([a + b for a, b in zip(prompts, rests, strict=True)])
    return [
        ids[len(prompt) :] if ids[: len(prompt)] == prompt else _behind(tokenizer, rest)
        for prompt, ids, rest in zip(before, both, rests, strict=True)
    ]


def response_text(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]) -> str:
    """Return the complete text of a response, with the opening that its prompt (ids) leaves open.

    Used as golden data after the same prompt, the text has the ids of the response again.
    """
    text = _text_behind(tokenizer, response)
    if tokenizer.reply_space:
        text = text.removeprefix(tokenizer.reply_space)
    elif text.startswith(" "):  # the tokenizer may have added it after a special token
        end = tokenizer.decode(list(prompt[-1:]), special=True)
        next_ids = tokenizer.encode(end + _ANCHOR)[len(tokenizer.encode(end)) :]
        text = text[1:] if _text_behind(tokenizer, next_ids).startswith(" ") else text
    return begun_by(tokenizer, prompt) + text


def begun_by(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Return the opening that a prompt (ids) leaves open, or ""."""
    last = tokenizer.decode(list(prompt[-_LAST:]), special=True)
    return opening(last, closed=False)


def begun_as(prompt: str, begun: str) -> str:
    """Return a prompt's text with the opening `begun` of another prompt in place of its own.

    It is for a response that was sampled after the other prompt: the response must be complete, and
    open its thoughts once. Blocks that both prompts have closed stay.
    """
    own = opening(prompt)
    if is_open(own) or is_open(begun):
        prompt = prompt.removesuffix(own)
    return prompt + begun if is_open(begun) else prompt


def notes(role: str, tokenizer: Tokenizer) -> list[str]:
    """Return lines for the start of a run about the prompts of a role and the boundary to its responses."""
    lines = []
    begun = opening(tokenizer.render("?"), closed=tokenizer.has_template)
    if is_open(begun):
        lines.append(
            f"{role}: prompts end in {begun!r}; golden solutions continue after it, and texts "
            "of responses are written with it"
        )
    elif begun:
        lines.append(f"{role}: prompts end in {begun!r}: the thoughts are closed")
    if turn := tokenizer.unopened_turn:
        lines.append(
            f"note: {role}: the chat template has no generation prompt, so that a response begins "
            f"where no turn of the model was opened (in a conversation it begins with {turn!r}); "
            f"name a template that has one: --config.{role}.chat_template=FILE"
        )
    if tokenizer.prints_date:
        lines.append(
            f"{role}: the chat template prints the date: that of data.date={tokenizer.day}, also "
            "when the run goes on on another day"
        )
    if tokenizer.adds_beginning:
        lines.append(f"{role}: prompts begin with {tokenizer.hf.bos_token} (add_bos_token)")
    if tokenizer.lacks_beginning:
        lines.append(
            f"note: {role}: tokenizer_config.json has add_bos_token and no bos_token, so that prompts "
            "begin without one; add it there, or set add_bos_token to false"
        )
    return lines


def _behind(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that follows another text with which it does not merge."""
    anchor = tokenizer.encode(_ANCHOR)
    ids = tokenizer.encode(_ANCHOR + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else tokenizer.encode(text)


def _text_behind(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids that follow others; a leading space is kept."""
    anchor = tokenizer.encode(_ANCHOR)
    text, head = tokenizer.decode([*anchor, *ids]), tokenizer.decode(anchor)
    return text[len(head) :] if text.startswith(head) else tokenizer.decode(list(ids))
