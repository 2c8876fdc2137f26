"""The content of one cell of a row as text: a text, a number, a chat, a solution, an answer.

This module does not know which column it reads; columns.py does. A cell that cannot be used raises
Unusable.
"""

import ast
import decimal
import json
import re
from typing import Any

from opd_jax.grading.boxed import last_boxed

Turns = list[tuple[str, str]]  # (role, text), in order

# Texts that stand for a missing value, in lower case and without brackets, quotes and a full stop.
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

_ROLES = {  # common names of the three roles; ShareGPT: {"from": ..., "value": ...}
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn, or columns of a row
_SWITCHES = frozenset(  # values of such a column that are settings, not thoughts
    ("on", "off", "high", "low", "medium", "true", "false", "yes", "no", "none", "auto", "enabled",
     "disabled")
)  # fmt: skip
_CHAT_AS_TEXT = re.compile(r"\s*\[?\s*\{\s*(?=([\"'])).*?\1(?:role|from)\1\s*:", re.DOTALL)

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_MARK = re.compile(r"(?<!#)####(?!#)\s*([^\n]*)")  # GSM8K's
# 1e5, 1e-07 and 6.02E23 as programs write them. `2e-1` may be twice e less 1, and 1E5 hexadecimal.
_FLOAT_AS_TEXT = re.compile(r"[+-]?(?:\d+\.\d*[eE][+-]?\d{1,3}|\d+[eE][+-]\d{2,3}|\d+e\d{1,3})")
_DIGITS = 21  # an integer of at most this many digits is written out
_AMOUNT = re.compile(
    r"(-?)\+?(?:\\?\$|[£€¥₹])? *(-?)"
    rf"(\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|{_FLOAT_AS_TEXT.pattern}|\d*\.?\d+)"
    r"(?: ?(?:(?P<percent>\\?%)|(?P<degrees>°)|\\?\$|[£€¥₹])"
    r"|(?: (?P<over>\d+/\d+)|(?P<under>/\d+))?"
    r"(?: (?P<unit>[A-Za-z]{2}[A-Za-z /.'-]*|[mg]/(?:s|h|min|m?L)))?)"
)
# Characters to strip after an answer: `72 ####`, `72,`, `72<|endoftext|>`. Each run is matched once.
_ENDING = re.compile(r"(?<![\s#,\\])(?:\s|<\|[^<>|]*\|>|</s>|[#,])+$")
# Words after a number that change its value, and so are not units.
_NO_UNIT = re.compile(
    r"(?:pi|sqrt|and|or|to|plus|minus|times|over|mod|ln|log|sin|cos|tan|half|dozen|hundred|thousand|"
    r"million|billion|trillion|percent)\b"
)


class Unusable(Exception):
    """Why a cell does not hold the required content, and the reason under which to count it.

    With a `reason` no other column is tried instead.
    """

    def __init__(self, text: str, reason: str = ""):
        super().__init__(text)
        self.reason = reason


def holds(value: Any) -> bool:
    """Return whether a cell holds a value: not null, NaN, a blank, or a list or object of only these.

    A file may nest deeper than Python recurses, so the values are visited in a loop.
    """
    to_visit = [value]
    while to_visit:
        inner = to_visit.pop()
        if isinstance(inner, list | dict):
            to_visit += inner.values() if isinstance(inner, dict) else inner
        elif inner.strip() if isinstance(inner, str) else inner is not None and inner == inner:
            return True  # NaN differs from itself
    return False


def text(value: Any) -> str:
    """Return a text with content. Raises Unusable for blanks, placeholders and invalid Unicode."""
    if not isinstance(value, str):
        raise Unusable(f"is {kind(value)}")
    if not value.strip():
        raise Unusable("is empty")
    if is_placeholder(value):
        raise Unusable(f"is the placeholder {value.strip()!r}")
    return unicode(value)


def unicode(value: str) -> str:
    """Return the text unchanged. Raises Unusable where it cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise Unusable("is not valid Unicode") from None
    return value


def is_placeholder(value: str) -> bool:
    r"""Return whether a text stands for a missing one: `notfound`, `N/A`, `None.`, `\text{proof}`, `[]`."""
    if len(value) > 60:
        return False
    bare = " ".join(value.split()).removesuffix(".")
    while match := _AS_TEXT.fullmatch(bare):
        bare = match[1].strip()
    while len(bare) > 1 and bare[0] + bare[-1] in _PAIRS and bare != "<>":
        bare = bare[1:-1].strip()
    # Only the capitals NA are a placeholder: na may be a product, Na an element.
    return bare == "NA" or bare.lower() in _PLACEHOLDERS


def scalar(value: Any) -> str:
    """Return a text or a number as text."""
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
    """Return one of several choices as text; here `None` is an answer: none of these."""
    if isinstance(value, str) and value.strip():
        return unicode(value).strip()
    return scalar(value)


def number(value: decimal.Decimal) -> str:
    r"""Format a finite number as mathematics does: 142.0 as `142`, 1e5 `100000`, 1e-7 `1 \times 10^{-7}`."""
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
    """Return an answer from a text, a number, the text after GSM8K's `####`, or a list of answers."""
    if isinstance(value, list):  # OlympiadBench: several answers
        if not value:
            raise Unusable("is an empty list")
        return ", ".join(_written_out(scalar(item)) for item in value)
    answer = scalar(value)
    if parts := marked(answer):
        answer = parts[1]
        if not answer:
            raise Unusable("has no answer after ####")
    return _written_out(answer)


def boxed(solution: str) -> str:
    r"""Return the answer in a solution's last \boxed{}, "" where there is none."""
    content = (last_boxed(solution) or "").strip()
    return "" if is_placeholder(content) else content


def _written_out(answer: str) -> str:
    """Write an answer in e-notation as mathematics does; any other answer is unchanged."""
    return number(decimal.Decimal(answer)) if _FLOAT_AS_TEXT.fullmatch(answer) else answer


def solution(value: Any) -> str:
    r"""Return a solution from a text, the first of several texts, or the last turn of a chat.

    GSM8K's last line `#### 72` becomes \boxed{72}; its calculator annotations are removed.
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
    r"""Return a solution's text, with GSM8K's `#### 72` written as \boxed{72}."""
    parts = marked(value)
    if parts is None:
        return value
    steps, gold = parts
    if not steps:
        raise Unusable("has nothing before ####")
    if not gold or last_boxed(steps) == gold:
        return steps
    return f"{steps}\n\\boxed{{{gold}}}"


def marked(value: str) -> tuple[str, str] | None:
    """Return (solution, answer) around GSM8K's last `####`; None where it is missing or starts a heading.

    The answer is the rest of the line, or the next line if that is an amount; "" for a placeholder
    or where there is none. A line is a heading if both a box and more text follow it, and a line of
    words already if either does.
    """
    mark = None
    for mark in _MARK.finditer(value):  # noqa: B007
        pass
    if mark is None:
        return None
    gold = _tidy(mark[1])
    more, has_box = bool(value[mark.end() :].strip()), last_boxed(value) is not None
    on_its_line = "\n" not in value[mark.start() : mark.start(1)]
    is_amount = _is_expression(gold) and re.search(r"\d", gold)
    if gold and not on_its_line and not has_box and not is_amount:
        return _CALCULATOR.sub("", value).strip(), ""
    if (more and has_box) or ((more or has_box) and not _is_expression(gold)):
        return None
    steps = _CALCULATOR.sub("", value[: mark.start()]).strip()
    return steps, "" if is_placeholder(gold) else gold


def _tidy(line: str) -> str:
    r"""Write the text after `####` as LaTeX: `$-5` is -5, `1,000.` 1000, `12 apples` 12 \text{ apples}."""
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
    """Return whether a line is an expression, maybe with a unit, and not words or `1. First part`."""
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+", "", line)
    return bool(line) and not re.match(r"\d+[.)]\s", line) and not re.search(r"[^\W\d_]{2}", bare)


def chat_of(value: Any) -> Any:
    """Parse a text that contains a list of turns, in JSON or Python syntax; return other values unchanged.

    A text is a chat only if all of it can be parsed and every turn has a known role and a text.
    """
    if not isinstance(value, str) or not (match := _CHAT_AS_TEXT.match(value)):
        return value
    # The quotes tell the two apart; each language parses some escapes of the other differently.
    read = json.loads if match[1] == '"' else ast.literal_eval
    try:
        parsed = read(value)
        turns = parsed if isinstance(parsed, list) else [parsed]
        chat(turns)
    except (ValueError, SyntaxError, RecursionError, MemoryError, Unusable):
        return value
    return turns


def chat(value: Any) -> Turns:
    """Return the turns of [{"role": ..., "content": ...}, ...], with thoughts before the content."""
    value = chat_of(value)
    if not isinstance(value, list):
        raise Unusable(f"is {kind(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Unusable("is a list, but not of chat turns")
        role, content, _ = _turn(turn)
        turns.append((role, unicode(content)))
    return turns


def _turn(turn: dict[str, Any]) -> tuple[str, str, set[str]]:
    """Return (role, text, keys of both) of a chat turn; a key of thoughts that the text repeats counts."""
    keys = {"role" if "role" in turn else "from", "content" if "content" in turn else "value"}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable("has a chat turn without role and content")
    if role.lower() not in _ROLES:
        raise Unusable(f"has a turn of role {role!r}, wanted system, user or assistant")
    role = _ROLES[role.lower()]
    if role == "assistant":
        for name in THOUGHTS:
            content = with_thoughts(turn.get(name), content)
        inner, mark, _ = content.partition("</think>")
        texts = {name: turn[name] for name in THOUGHTS if mark and isinstance(turn.get(name), str)}
        keys |= {name for name, text in texts.items() if _thoughts(text) in inner}
    return role, content, keys


def unread(value: Any) -> set[str]:
    """Return the keys of chat turns that hold a value and that `chat` does not read; else an empty set."""
    value = chat_of(value)
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    names: set[str] = set()
    for turn in turns:
        try:
            keys = _turn(turn)[2]
        except Unusable:  # the turn is not used
            continue
        names |= {key for key, held in turn.items() if key not in keys and holds(held)}
    return names


def history(value: list[Any]) -> Turns:
    """Return earlier turns from a chat, or from pairs [[question, answer], ...]."""
    if not all(isinstance(item, list) for item in value):
        return chat(value)
    turns: Turns = []
    for pair in value:
        if len(pair) != 2 or not all(isinstance(item, str) for item in pair):
            raise Unusable("is not a list of pairs [question, answer]")
        turns += [("user", unicode(pair[0])), ("assistant", unicode(pair[1]))]
    return turns


def with_thoughts(thoughts: Any, content: str) -> str:
    """Put the thoughts before `content`, if there are any and it does not contain them already.

    A setting ("on", "high") is not a thought, nor is a placeholder.
    """
    if not isinstance(thoughts, str) or "</think>" in content:
        return content
    inner = _thoughts(thoughts)
    if inner.lower() in _SWITCHES or is_placeholder(inner):
        return content
    return f"<think>\n{unicode(inner)}\n</think>\n\n{content}"


def _thoughts(text: str) -> str:
    return text.strip().removeprefix("<think>").removesuffix("</think>").strip()


def kind(value: Any) -> str:
    """Return the name of a value's type for errors."""
    name = type(value).__name__
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        name, name
    )
