"""Atomic writes of small files: a reader sees a complete file or none, even if the process is killed."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from opd_jax.errors import WorkdirError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `path` atomically when the block ends without an error."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # the contents must reach the disk before the new name does
    temporary.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace `path` atomically by a file with `text` in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: pathlib.Path, value: Any, *, indent: int | None = None) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextlib.contextmanager
def reported(path: str | pathlib.Path, advice: str) -> Iterator[None]:
    """Turn an OSError of the block into a WorkdirError with `path`, the reason and the advice."""
    try:
        yield
    except WorkdirError:
        raise
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be written ({error.strerror or error}); {advice}"
        ) from None
