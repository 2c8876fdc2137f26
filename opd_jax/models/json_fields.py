"""Fields of a JSON object from outside, each checked when it is read."""

from typing import Any

from opd_jax.errors import ModelError

Json = dict[str, Any]
LARGEST = 100_000_000  # of any size: a larger one is a broken file, and would overflow computations


def show(value: Any) -> str:
    """Format a value for an error message: one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def integer(value: Any, name: str, source: str) -> int:
    """Return `value` if it is an integer from 1 to LARGEST. Raises ModelError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise ModelError(
            f"{source}: {name} is {show(value)}, wanted a positive integer up to {LARGEST}; "
            "download the folder again or correct the file"
        )
    return value


def number(value: Any, name: str, source: str) -> float:
    """Return `value` as a float if it is a number in (0, 1e12). Raises ModelError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelError(
            f"{source}: {name} is {show(value)}, wanted a positive number; correct the file"
        )
    return float(value)


def flag(value: Any, name: str, source: str) -> bool:
    """Return `value` if it is true, false or null (false). Raises ModelError otherwise."""
    if value is not None and not isinstance(value, bool):
        raise ModelError(
            f"{source}: {name} is {show(value)}, wanted true or false; correct the file"
        )
    return bool(value)
