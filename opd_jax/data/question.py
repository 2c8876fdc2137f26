"""The question of a row: one column or several that belong together, and the turns before it.

A question found under its usual name is joined with the columns that it needs: `context` and `passage`
before it, `input` and `choices` after it. A column that the config names is used alone. Earlier turns
and a system turn are kept either way.
"""

import dataclasses
import re
import string
from collections.abc import Container
from typing import Any

from opd_jax.data import cells
from opd_jax.data.cells import Turns, Unusable
from opd_jax.data.files import Row
from opd_jax.data.problem import History

BEFORE, AFTER, CHOICES = ("context", "passage"), ("input",), ("choices", "options")
HISTORY = "history"
SYSTEM = ("system", "system_prompt")
UNSEEN = ("images", "image", "videos", "video", "audios", "audio")  # these models read text
_LABELLED = re.compile(r"\s*\(?([A-Z])\s*[.):]\s*(.*\S)\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Question:
    """The question of a row.

    Attributes:
      prompt: text of the last user turn. history: (role, text) of the turns before it.
      system: text of the system turn, "" where there is none.
      parts: the columns it comes from, in order; "" is the problem's own.
      choices: (label, text) of the choices, if it offers any.
    """

    prompt: str
    system: str
    history: History
    parts: tuple[str, ...]
    choices: tuple[tuple[str, str], ...]


def read_question(
    value: Any, row: Row, column: str, *, alone: bool, answered: Container[str]
) -> Question:
    """Return the question of a row whose problem is `value`, a text or a chat, in `column`.

    `alone`: do not join other columns. `answered`: columns that may end in an assistant turn, because
    solutions are read from them. Raises Unusable.
    """
    value = cells.chat_of(value)
    earlier = cells.chat_of(row.get(HISTORY))
    turns_of = [item for chat in (value, earlier) if isinstance(chat, list) for item in chat]
    media = [name for holder in (row, *turns_of) for name in _media(holder)]
    if not alone and media:
        raise Unusable(
            f"comes with {media[0]!r}, which a text model cannot see (a column that you name is used "
            "alone)",
            "no problem",
        )
    parts: list[str] = [""]
    choices: list[tuple[str, str]] = []
    if isinstance(value, str):
        text = cells.text(value)
        if not alone:
            text, parts, choices = _joined(text, row)
        turns = [("user", text)]
        if isinstance(earlier, list) and cells.holds(earlier):
            turns, parts = [*cells.history(earlier), *turns], [HISTORY, *parts]
    else:
        turns = cells.chat(value)
    if turns and turns[0][0] == "system":
        (_, system), *turns = turns
    else:
        system, where = next(
            ((row[name], name) for name in SYSTEM if _is_said(row.get(name))), ("", "")
        )
        system, parts = cells.unicode(system), [where, *parts] if where else parts
    last = _last_user(turns)
    answers_after = len(turns) - 1 - last
    if answers_after > 1:
        raise Unusable(f"ends in {answers_after} assistant turns, wanted at most one")
    if answers_after and not alone and column not in answered:
        raise Unusable(
            "ends in an assistant turn, which a prompt cannot keep (a solution can: name the column as "
            "that too)"
        )
    return Question(
        cells.text(turns[last][1]), system, tuple(turns[:last]), tuple(parts), tuple(choices)
    )


def _media(holder: Any) -> list[str]:
    """Return the columns of a row, or keys of a turn, that hold media for which the models have no input."""
    if not isinstance(holder, dict):
        return []
    there = [name for name in UNSEEN if isinstance(holder.get(name), str | bytes | list | dict)]
    return [name for name in there if cells.holds(holder[name])]


def _is_said(system: Any) -> bool:
    return isinstance(system, str) and _says(system)


def _says(value: Any) -> bool:
    """Return whether a cell holds a value that is not a placeholder."""
    return cells.holds(value) and not (isinstance(value, str) and cells.is_placeholder(value))


def _last_user(turns: Turns) -> int:
    """Return the index of the last user turn, in turns without the first system turn."""
    roles = [role for role, _ in turns]
    if "system" in roles:
        raise Unusable("has a system turn after its first turn")
    if "user" not in roles:
        raise Unusable("has no user turn")
    return len(roles) - 1 - roles[::-1].index("user")


def _joined(text: str, row: Row) -> tuple[str, list[str], list[tuple[str, str]]]:
    """Join a question with its other columns; return the text, all columns ("" for its own), the choices."""

    def columns_of(names: tuple[str, ...]) -> list[tuple[str, str]]:
        there = [name for name in names if _says(row.get(name)) and row[name] != text]
        for name in there:
            if not isinstance(row[name], str):
                raise Unusable(
                    f"comes with {name!r}, which is {cells.kind(row[name])}", "no problem"
                )
        return [(name, cells.unicode(row[name])) for name in there]

    pieces = [*columns_of(BEFORE), ("", text), *columns_of(AFTER)]
    names, value = _choices_of(row)
    choices: list[tuple[str, str]] = []
    if names:
        choices = _choices(value, names)
        pieces.append((names, "" if _offers(text, choices) else _lines(choices)))
    texts = [piece for _, piece in pieces if piece]
    return "\n\n".join(texts), [name for name, _ in pieces], choices


def _choices_of(row: Row) -> tuple[str, Any]:
    """Return the columns that hold the choices, and their values: one column, or A, B, C, ..."""
    for name in CHOICES:
        if _says(row.get(name)):
            return name, row[name]
    letters = [letter for letter in string.ascii_uppercase if cells.holds(row.get(letter))]
    if letters[:2] == ["A", "B"]:
        return " + ".join(letters), {letter: row[letter] for letter in letters}
    return "", None


def _choices(value: Any, name: str) -> list[tuple[str, str]]:
    """Return (label, text) of each choice; a single text is unchanged and has the label ""."""
    if isinstance(value, str):
        return [("", cells.unicode(value))]
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC
        value = [{"label": a, "text": b} for a, b in zip(value.get("label", ()), value["text"])]  # noqa: B905
    if isinstance(value, dict):
        value = [{"label": label, "text": one} for label, one in value.items() if cells.holds(one)]
    try:
        if all(isinstance(item, dict) for item in value):
            return [(str(item["label"]), cells.option(item["text"])) for item in value]
        texts = [cells.option(item) for item in value]
    except (KeyError, TypeError, Unusable):
        raise Unusable(
            f"comes with {name!r}, which is no list of texts or labels with texts", "no problem"
        ) from None
    labelled = [match for text in texts if (match := _LABELLED.fullmatch(text))]
    if len(labelled) == len(texts):
        return [(match[1], match[2]) for match in labelled]
    return list(zip(string.ascii_uppercase, texts, strict=False))


def _lines(choices: list[tuple[str, str]]) -> str:
    return "\n".join(f"{label}. {text}" if label else text for label, text in choices)


def _offers(text: str, choices: list[tuple[str, str]]) -> bool:
    """Return whether a question lists its choices itself: every label, followed by a punctuation mark."""
    return all(
        label and re.search(rf"(?<![^\W_]){re.escape(label)}\s*[.):]", text) for label, _ in choices
    ) or any(not label and one in text for label, one in choices)
