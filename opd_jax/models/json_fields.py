"""Fields of a JSON object that came from outside, each checked as it is read."""

from typing import Any

from opd_jax.errors import ModelError

Json = dict[str, Any]
LARGEST = 100_000_000  # of any size: more is a broken file, and would overflow what is computed


def show(value: Any) -> str:
    """A value as an error message quotes it: one line, not longer than a reader wants."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def integer(value: Any, name: str, source: str) -> int:
    """`value` where it is a whole number from 1 to LARGEST. Raises ModelError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise ModelError(
            f"{source}: {name} is {show(value)}, wanted a positive integer up to {LARGEST}; "
            "download the folder again or correct the file"
        )
    return value


def number(value: Any, name: str, source: str) -> float:
    """`value` as a float where it is a number in (0, 1e12). Raises ModelError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelError(
            f"{source}: {name} is {show(value)}, wanted a positive number; correct the file"
        )
    return float(value)


def flag(value: Any, name: str, source: str) -> bool:
    """`value` where it is true, false or null (false). Raises ModelError otherwise."""
    if value is not None and not isinstance(value, bool):
        raise ModelError(
            f"{source}: {name} is {show(value)}, wanted true or false; correct the file"
        )
    return bool(value)
