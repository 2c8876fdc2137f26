"""A running workdir on the terminal, read again whenever a look is due."""

import os
import pathlib
import sys
import time
from collections.abc import Sequence

from opd_jax.report.read import read_all
from opd_jax.report.summary import summary

_HOME, _REST = "\x1b[H\x1b[2J", "\x1b[0m"


def watch(folders: Sequence[str], *, every: float, once: bool = False) -> None:
    """Print the summary, and again every so many seconds until Ctrl-C, which ends it quietly.

    On a terminal each look replaces the one before. Nothing is read anew while no file has changed.
    Raises WorkdirError: a folder is no run.
    """
    live = sys.stdout.isatty() and not once
    seen, text = None, ""
    try:
        while True:
            state = _state(folders)
            if state != seen:
                seen, text = state, summary(read_all(folders))
                told = "" if once else f"\n\n{time.strftime('%H:%M:%S')}, Ctrl-C ends this"
                print(f"{_HOME if live else ''}{_fitting(text, live)}{told}", flush=True)
            if once:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        print(_REST if live else "", flush=True)


def _state(folders: Sequence[str]) -> list[tuple[int, int] | None]:
    """Size and time of every metrics.jsonl."""
    out: list[tuple[int, int] | None] = []
    for folder in folders:
        path = pathlib.Path(folder) / "metrics.jsonl"
        try:
            found = path.stat()
            out.append((found.st_size, found.st_mtime_ns))
        except OSError:
            out.append(None)
    return out


def _fitting(text: str, live: bool) -> str:
    """No more lines than the terminal has."""
    if not live:
        return text
    room = os.get_terminal_size().lines - 3
    lines = text.split("\n")
    return (
        text if len(lines) <= room else "\n".join([*lines[: room - 1], "... (more lines than fit)"])
    )
