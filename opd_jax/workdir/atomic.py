"""Small files that appear whole or not at all, whenever the process is killed."""

import json
import os
import pathlib
from typing import Any


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace `path` by a file that holds `text`: whoever reads it sees the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # the name must not be on the disk before what it names
    beside.replace(path)


def write_json(path: pathlib.Path, value: Any, *, indent: int | None = None) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=indent) + "\n")
