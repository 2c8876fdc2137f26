"""Live view of a running workdir on the terminal, read again at intervals."""

import os
import pathlib
import sys
import time
from collections.abc import Sequence

from opd_jax.report.read import read_all
from opd_jax.report.summary import summary

_HOME, _REST = "\x1b[H\x1b[2J", "\x1b[0m"


def watch(folders: Sequence[str], *, every: float, once: bool = False) -> None:
    """Print the summary, and again every `every` seconds until Ctrl-C.

    On a terminal each view replaces the one before. Nothing is read again while no file has changed.
    Raises WorkdirError: a folder is not a run.
    """
    live = sys.stdout.isatty() and not once
    seen, text = None, ""
    try:
        while True:
            state = _state(folders)
            if state != seen:
                seen, text = state, summary(read_all(folders))
                footer = "" if once else f"\n\n{time.strftime('%H:%M:%S')}, Ctrl-C ends this"
                print(f"{_HOME if live else ''}{_fitting(text, live)}{footer}", flush=True)
            if once:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        print(_REST if live else "", flush=True)


def _state(folders: Sequence[str]) -> list[tuple[int, int] | None]:
    """Return size and modification time of every metrics.jsonl."""
    out: list[tuple[int, int] | None] = []
    for folder in folders:
        path = pathlib.Path(folder) / "metrics.jsonl"
        try:
            status = path.stat()
            out.append((status.st_size, status.st_mtime_ns))
        except OSError:
            out.append(None)
    return out


def _fitting(text: str, live: bool) -> str:
    """Cut the text to the lines of the terminal."""
    if not live:
        return text
    room = os.get_terminal_size().lines - 3
    lines = text.split("\n")
    return (
        text if len(lines) <= room else "\n".join([*lines[: room - 1], "... (more lines than fit)"])
    )
