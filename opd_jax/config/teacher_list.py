"""The further teachers of a config: NAME=PATH,NAME=PATH."""

import re

_NAME = re.compile(r"[^\s=,]+")


def parse(text: str) -> dict[str, str]:
    """Return {name: path} in the order of the text; "" has none.

    Raises ValueError for what is no NAME=PATH, and for a name that stands there twice.
    """
    found: dict[str, str] = {}
    for item in text.split(",") if text else ():
        name, equals, path = (part.strip() for part in item.partition("="))
        if not (equals and path and is_name(name)):
            raise ValueError(f"{item.strip()!r} is no NAME=PATH")
        if name in found:
            raise ValueError(f"two teachers have the name {name!r}")
        found[name] = path
    return found


def is_name(text: str) -> bool:
    """Return whether a teacher may be called so."""
    return _NAME.fullmatch(text) is not None


def joined(teachers: dict[str, str]) -> str:
    """Return the text that `parse` reads as these teachers."""
    return ",".join(f"{name}={path}" for name, path in teachers.items())
