"""Small files that appear complete or not at all, whenever the process is killed."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from opd_jax.errors import WorkdirError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file that replaces `path` when the block ends without an error: readers see the old or the new."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # the name must not be on the disk before what it names
    beside.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace `path` by a file that holds `text`, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: pathlib.Path, value: Any, *, indent: int | None = None) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextlib.contextmanager
def reported(path: str | pathlib.Path, advice: str) -> Iterator[None]:
    """Turn an error of the operating system into a WorkdirError: `path`, the reason, the advice."""
    try:
        yield
    except WorkdirError:
        raise
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be written ({error.strerror or error}); {advice}"
        ) from None
