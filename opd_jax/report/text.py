"""Texts of models and strangers, made harmless: for HTML, for figures, for a terminal."""

import html
import re
import unicodedata

# Controls but for line feed and tab, lone surrogates, and what UTF-8 or XML cannot hold.
_BROKEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Marks that turn the direction of the text around them.
_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: object) -> str:
    """The text with a mark (U+FFFD) for what cannot be shown, and [U+202E] for what turns a line."""
    told = _TURNING.sub(lambda found: f"[U+{ord(found[0]):04X}]", str(text).replace("\r\n", "\n"))
    return _BROKEN.sub("\ufffd", told)


def escape(text: object) -> str:
    """The clean text as it stands in HTML, also inside quotes."""
    return html.escape(clean(text), quote=True)


def line(text: object, width: int) -> str:
    """The clean text on one line of at most so many columns."""
    flat = " ".join(clean(text).split())
    return flat if columns(flat) <= width else _cut(flat, width - 1) + "…"


def columns(text: str) -> int:
    """Columns of a terminal that the text takes: wide characters take two."""
    return sum(
        0 if unicodedata.combining(x) else 2 if unicodedata.east_asian_width(x) in "WF" else 1
        for x in text
    )


def _cut(text: str, width: int) -> str:
    while columns(text) > width:
        text = text[:-1]
    return text
