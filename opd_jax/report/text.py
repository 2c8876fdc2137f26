"""Text from models and other people, made safe for HTML, figures and a terminal."""

import html
import re
import unicodedata

# Control characters except line feed and tab, lone surrogates, and what UTF-8 or XML cannot encode.
_BROKEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Marks that change the direction of the text around them.
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: object) -> str:
    """Replace characters that cannot be shown by U+FFFD, and direction marks by their names, [U+202E]."""
    marked = _DIRECTION.sub(lambda mark: f"[U+{ord(mark[0]):04X}]", str(text).replace("\r\n", "\n"))
    return _BROKEN.sub("\ufffd", marked)


def escape(text: object) -> str:
    """Escape the clean text for HTML, also inside quotes."""
    return html.escape(clean(text), quote=True)


def line(text: object, width: int) -> str:
    """Return the clean text on one line of at most `width` columns."""
    flat = " ".join(clean(text).split())
    return flat if columns(flat) <= width else _cut(flat, width - 1) + "…"


def columns(text: str) -> int:
    """Return the terminal columns of the text: wide characters take two."""
    return sum(
        0 if unicodedata.combining(x) else 2 if unicodedata.east_asian_width(x) in "WF" else 1
        for x in text
    )


def _cut(text: str, width: int) -> str:
    while columns(text) > width:
        text = text[:-1]
    return text
