r"""What one cell of a row holds, as text: a text, a number, a chat, a solution, an answer.

Nothing here knows which column it reads; columns.py does. A cell that cannot be used raises Unusable.
"""

import ast
import decimal
import json
import re
from typing import Any

from opd_jax.grading.boxed import last_boxed

Turns = list[tuple[str, str]]  # (role, text), in order

# Texts that mean "nothing here", in lower case and without brackets, quotes and a full stop.
_PLACEHOLDERS = frozenset(
    ("proof", "see proof", "see solution", "notfound", "not found", "answer not found", "none",
     "null", "nan", "n/a", "n.a", "<na>", "not available", "not applicable", "not provided",
     "not given", "no answer", "no answer provided", "no final answer", "proved", "q.e.d", "noinput",
     "no input", "unknown", "tbd", "-", "--", "—", "")
)  # fmt: skip
_PAIRS = ("[]", "()", "<>", '""', "''", "``", "**")  # around a placeholder
_AS_TEXT = re.compile(
    r"\$?\s*\\(?:boxed|text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}\s*\$?", re.DOTALL
)

_ROLES = {  # what people call the three; ShareGPT: {"from": ..., "value": ...}
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # of a turn, or of a row
_SWITCHES = frozenset(  # values of a column of that name that are no thoughts
    ("on", "off", "high", "low", "medium", "true", "false", "yes", "no", "none", "auto", "enabled",
     "disabled")
)  # fmt: skip
_CHAT_AS_TEXT = re.compile(r"\s*\[?\s*\{\s*(?=([\"'])).*?\1(?:role|from)\1\s*:", re.DOTALL)

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_MARK = re.compile(r"(?<!#)####(?!#)\s*([^\n]*)")  # GSM8K's
# 1e5, 1e-07 and 6.02E23 as programs write them. `2e-1` may be twice e less 1, and 1E5 hexadecimal.
_FLOAT_AS_TEXT = re.compile(r"[+-]?(?:\d+\.\d*[eE][+-]?\d{1,3}|\d+[eE][+-]\d{2,3}|\d+e\d{1,3})")
_DIGITS = 21  # a whole number of at most so many is written out
_AMOUNT = re.compile(
    r"(-?)\+?(?:\\?\$|[£€¥₹])? *(-?)"
    rf"(\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|{_FLOAT_AS_TEXT.pattern}|\d*\.?\d+)"
    r"(?: ?(?:(?P<percent>\\?%)|(?P<degrees>°)|\\?\$|[£€¥₹])"
    r"|(?: (?P<over>\d+/\d+)|(?P<under>/\d+))?"
    r"(?: (?P<unit>[A-Za-z]{2}[A-Za-z /.'-]*|[mg]/(?:s|h|min|m?L)))?)"
)
# Behind an answer: `72 ####`, `72,`, `72<|endoftext|>`. Each run of these is looked at once.
_ENDING = re.compile(r"(?<![\s#,\\])(?:\s|<\|[^<>|]*\|>|</s>|[#,])+$")
# Words behind a number that change its value: no units.
_NO_UNIT = re.compile(
    r"(?:pi|sqrt|and|or|to|plus|minus|times|over|mod|ln|log|sin|cos|tan|half|dozen|hundred|thousand|"
    r"million|billion|trillion|percent)\b"
)


class Unusable(Exception):
    """Why a cell does not hold what was looked for, and the reason to count it under.

    With a `reason` another column is no substitute.
    """

    def __init__(self, text: str, reason: str = ""):
        super().__init__(text)
        self.reason = reason


def holds(value: Any) -> bool:
    """Whether there is something in a cell: not null, NaN, a blank, or a list or object of these."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | dict):
        return any(map(holds, value.values() if isinstance(value, dict) else value))
    return value is not None and value == value  # NaN is not


def text(value: Any) -> str:
    """A text that says something. Raises Unusable for others: blanks, placeholders, half characters."""
    if not isinstance(value, str):
        raise Unusable(f"is {kind(value)}")
    if not value.strip():
        raise Unusable("is empty")
    if is_placeholder(value):
        raise Unusable(f"is the placeholder {value.strip()!r}")
    return unicode(value)


def unicode(value: str) -> str:
    """The text itself. Raises Unusable where it cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise Unusable("is not valid Unicode") from None
    return value


def is_placeholder(value: str) -> bool:
    r"""Whether a text stands for a missing one: `notfound`, `N/A`, `None.`, `\text{proof}`, `[]`."""
    if len(value) > 60:
        return False
    bare = " ".join(value.split()).removesuffix(".")
    while match := _AS_TEXT.fullmatch(bare):
        bare = match[1].strip()
    while len(bare) > 1 and bare[0] + bare[-1] in _PAIRS and bare != "<>":
        bare = bare[1:-1].strip()
    # Of n and a only capitals: na may be a product, Na an element.
    return bare == "NA" or bare.lower() in _PLACEHOLDERS


def scalar(value: Any) -> str:
    """Text of a text or a number."""
    if isinstance(value, str):
        return text(value).strip()
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # more digits than Python writes
            raise Unusable("is a number of too many digits") from None
    if isinstance(value, float | decimal.Decimal):
        exact = decimal.Decimal(repr(value)) if isinstance(value, float) else value
        if not exact.is_finite():
            raise Unusable(f"is {value}")
        return number(exact)
    raise Unusable(f"is {kind(value)}")


def option(value: Any) -> str:
    """Text of one of several answers to choose from, where `None` says something: none of these."""
    if isinstance(value, str) and value.strip():
        return unicode(value).strip()
    return scalar(value)


def number(value: decimal.Decimal) -> str:
    r"""A finite number as mathematics writes it: 142.0 is `142`, 1e5 `100000`, 1e-7 `1 \times 10^{-7}`."""
    size = value.adjusted()
    if not value:
        return "0"
    if size < _DIGITS and value == value.to_integral_value():
        return str(int(value))
    if -5 < size < _DIGITS:
        return f"{value:f}"
    first, *others = value.as_tuple().digits
    rest = "".join(map(str, others)).rstrip("0")
    mantissa = f"{'-' * value.is_signed()}{first}{'.' * bool(rest)}{rest}"
    return f"{mantissa} \\times 10^{{{size}}}"


def answer(value: Any) -> str:
    """An answer: a text or a number, GSM8K's what stands behind `####`; a list wants all of its items."""
    if isinstance(value, list):  # OlympiadBench: several answers
        if not value:
            raise Unusable("is an empty list")
        return ", ".join(_written_out(scalar(item)) for item in value)
    found = scalar(value)
    if parts := marked(found):
        found = parts[1]
        if not found:
            raise Unusable("has no answer behind ####")
    return _written_out(found)


def boxed(solution: str) -> str:
    r"""The answer in a solution's last \boxed{}, "" where there is none."""
    found = (last_boxed(solution) or "").strip()
    return "" if is_placeholder(found) else found


def _written_out(found: str) -> str:
    """An answer in e-notation as mathematics writes it, any other as it is."""
    return number(decimal.Decimal(found)) if _FLOAT_AS_TEXT.fullmatch(found) else found


def solution(value: Any) -> str:
    r"""A solution: a text, the first of several, or the last turn of a chat.

    GSM8K's last line `#### 72` becomes \boxed{72}, its calculator marks go.
    """
    value = chat_of(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = value[0]
    if isinstance(value, str):
        return golden(text(value))
    turns = chat(value)
    if not turns or turns[-1][0] != "assistant":
        raise Unusable("does not end in an assistant turn")
    return golden(text(turns[-1][1]))


def golden(value: str) -> str:
    r"""A solution's text, GSM8K's `#### 72` written as \boxed{72}."""
    parts = marked(value)
    if parts is None:
        return value
    steps, found = parts
    if not steps:
        raise Unusable("has nothing before ####")
    if not found or last_boxed(steps) == found:
        return steps
    return f"{steps}\n\\boxed{{{found}}}"


def marked(value: str) -> tuple[str, str] | None:
    """(solution, answer) around GSM8K's last `####`; None where that is not there or is a heading.

    The answer is the rest of the line, or the next line where that is an amount; "" for a placeholder
    or where there is none. A line is a heading where both a box and more text follow, and one of
    words where either does.
    """
    mark = None
    for mark in _MARK.finditer(value):  # noqa: B007
        pass
    if mark is None:
        return None
    found = _tidy(mark[1])
    more, has_box = bool(value[mark.end() :].strip()), last_boxed(value) is not None
    on_its_line = "\n" not in value[mark.start() : mark.start(1)]
    is_amount = _is_expression(found) and re.search(r"\d", found)
    if found and not on_its_line and not has_box and not is_amount:
        return _CALCULATOR.sub("", value).strip(), ""
    if (more and has_box) or ((more or has_box) and not _is_expression(found)):
        return None
    steps = _CALCULATOR.sub("", value[: mark.start()]).strip()
    return steps, "" if is_placeholder(found) else found


def _tidy(line: str) -> str:
    r"""What stands behind `####` as LaTeX: `$-5` is -5, `1,000.` 1000, `12 apples` 12 \text{ apples}."""
    line = _ENDING.sub("", _CALCULATOR.sub("", line)).strip().strip("*").strip()
    line = re.sub(r"(?i)^(?:the )?(?:final )?answer(?: is\b|:)[: ]*", "", line)
    if not line.endswith(".."):
        line = line.removesuffix(".").strip()
    line = (last_boxed(line) or line).strip()
    if math_in := re.fullmatch(r"\$([^$]+)\$", line):
        line = math_in[1].strip()
    match = _AMOUNT.fullmatch(line)
    if match is None:
        return line
    sign, plain = match[1] or match[2], match[3].replace(",", "")
    if match["percent"]:
        return f"{sign}{plain}\\%"
    if match["degrees"]:
        return f"{sign}{plain}^\\circ"
    fraction = match["under"] or ""
    if match["over"]:
        over, under = match["over"].split("/")
        fraction = f"\\frac{{{over}}}{{{under}}}"
    if unit := match["unit"]:
        if _NO_UNIT.match(unit.lower()):
            return line
        return f"{sign}{_written_out(plain)}{fraction} \\text{{ {unit.strip()}}}"
    return f"{sign}{plain}{fraction}"


def _is_expression(line: str) -> bool:
    """Whether a line is an expression, maybe with a unit, rather than words or `1. First part`."""
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+", "", line)
    return bool(line) and not re.match(r"\d+[.)]\s", line) and not re.search(r"[^\W\d_]{2}", bare)


def chat_of(value: Any) -> Any:
    """The list of turns that a text spells out, as JSON or as Python does; any other value as it is.

    A text is a chat only where all of it is read and every turn has a known role and a text.
    """
    if not isinstance(value, str) or not (match := _CHAT_AS_TEXT.match(value)):
        return value
    # By its quotes, for each language reads some of the other's escapes in its own way.
    read = json.loads if match[1] == '"' else ast.literal_eval
    try:
        found = read(value)
        turns = found if isinstance(found, list) else [found]
        chat(turns)
    except (ValueError, SyntaxError, RecursionError, MemoryError, Unusable):
        return value
    return turns


def chat(value: Any) -> Turns:
    """The turns of [{"role": ..., "content": ...}, ...], thoughts before what was said."""
    value = chat_of(value)
    if not isinstance(value, list):
        raise Unusable(f"is {kind(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Unusable("is a list, but not of chat turns")
        role, said, _ = _turn(turn)
        turns.append((role, unicode(said)))
    return turns


def _turn(turn: dict[str, Any]) -> tuple[str, str, set[str]]:
    """(role, what was said, keys of both) of a chat turn; a key of thoughts that say the same is one."""
    keys = {"role" if "role" in turn else "from", "content" if "content" in turn else "value"}
    role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(said, str):
        raise Unusable("has a chat turn without role and content")
    if role.lower() not in _ROLES:
        raise Unusable(f"has a turn of role {role!r}, wanted system, user or assistant")
    role = _ROLES[role.lower()]
    if role == "assistant":
        for name in THOUGHTS:
            said = with_thoughts(turn.get(name), said)
        inner, mark, _ = said.partition("</think>")
        texts = {name: turn[name] for name in THOUGHTS if mark and isinstance(turn.get(name), str)}
        keys |= {name for name, text in texts.items() if _thoughts(text) in inner}
    return role, said, keys


def unread(value: Any) -> set[str]:
    """Keys of chat turns that hold something and that `chat` does not read; none of another value."""
    value = chat_of(value)
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    found: set[str] = set()
    for turn in turns:
        try:
            keys = _turn(turn)[2]
        except Unusable:  # nothing was taken from it
            continue
        found |= {key for key, held in turn.items() if key not in keys and holds(held)}
    return found


def history(value: list[Any]) -> Turns:
    """Earlier turns: a chat, or pairs [[question, answer], ...]."""
    if not all(isinstance(item, list) for item in value):
        return chat(value)
    turns: Turns = []
    for pair in value:
        if len(pair) != 2 or not all(isinstance(item, str) for item in pair):
            raise Unusable("is not a list of pairs [question, answer]")
        turns += [("user", unicode(pair[0])), ("assistant", unicode(pair[1]))]
    return turns


def with_thoughts(thoughts: Any, said: str) -> str:
    """`said` behind its thoughts, where there are any and it does not hold them already.

    A switch ("on", "high") is not a thought, nor is a placeholder.
    """
    if not isinstance(thoughts, str) or "</think>" in said:
        return said
    inner = _thoughts(thoughts)
    if inner.lower() in _SWITCHES or is_placeholder(inner):
        return said
    return f"<think>\n{unicode(inner)}\n</think>\n\n{said}"


def _thoughts(text: str) -> str:
    return text.strip().removeprefix("<think>").removesuffix("</think>").strip()


def kind(value: Any) -> str:
    """What a value is called in an error."""
    name = type(value).__name__
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        name, name
    )
