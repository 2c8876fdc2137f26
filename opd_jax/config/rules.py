"""Rules of single fields that are no range and no list of choices."""

import datetime
import importlib
import re
from typing import Any

from opd_jax.config.record import (
    Rule,
)


def _is_day(text: str) -> bool:
    try:
        return not text or str(datetime.date.fromisoformat(text)) == text
    except ValueError:
        return False


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(error) from None
    return True


def _rising(numbers: Any) -> bool:
    return _counts(numbers) and list(numbers) == sorted(set(numbers))


def _counts(numbers: Any) -> bool:
    whole = all(type(number) is int and number >= 1 for number in numbers)
    return whole and len(set(numbers)) == len(numbers)


def shows_problem(text: str) -> bool:
    """Return whether a prompt template shows the problem, or is "same"."""
    templates = importlib.import_module("opd_jax.data.templates")  # its package loads JAX
    return text == "same" or templates.shows_problem(text)


def shows(text: str, name: str) -> bool:
    """Return whether a prompt template shows the column of this name."""
    templates = importlib.import_module("opd_jax.data.templates")
    return name in templates.columns_of(text)


def _words(words: Any) -> bool:
    return all(isinstance(word, str) and re.fullmatch(r"[^\W\d_]+", word) for word in words)


DAY = Rule("a day as YYYY-MM-DD, such as 2026-01-31, or none", _is_day)
PATTERN = Rule("a regular expression", _is_pattern)
TEMPLATE = Rule("a text that holds {problem} or a {column} of its row", shows_problem)
TEXTS = Rule(
    'texts, such as ("<","think")', lambda texts: all(isinstance(x, str) and x for x in texts)
)
POSITIONS = Rule("whole numbers above 0, each above the one before, such as (256,512)", _rising)
FUNCTION = Rule(
    "a function as module:function, such as my_rewards:score",
    lambda text: not text or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None,
)
WORDS = Rule('words of letters, such as ("wait","but")', _words)
DEPTHS = Rule("different whole numbers, at least 1, such as 64,256", _counts)
TRAINING_FILE = Rule("a file of problems (.jsonl, .json, .parquet), or tiny:train", bool)
TRAINED_MODEL = Rule("the path of a Hugging Face folder", bool)
