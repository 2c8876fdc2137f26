"""Fuzz every reader: it accepts mutated input or raises an OpdError, in bounded time and memory.

    python -m tests.support.fuzz 10000              every reader
    python -m tests.support.fuzz 10000 parquet      one of them

The generator is seeded: case I of a reader is always the same. A failure names its case:

    python -m tests.support.fuzz --case=parquet:137
"""

import argparse
import contextlib
import pathlib
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from opd_jax.errors import OpdError
from tests.support.fuzz_readers import READERS

LIMIT_S = 10  # for one case; most take milliseconds
GROWTH_MIB = 600  # of the process over a whole lane


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the body takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def case(name: str, number: int, folder: pathlib.Path) -> bool:
    """Run one case and return whether the reader accepted it. Any error but an OpdError is raised."""
    inside = folder / "case"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    try:
        with bounded(LIMIT_S):
            READERS[name](random.Random(f"{name}:{number}"), inside)
    except OpdError as error:
        if "\n" in str(error):
            raise AssertionError(f"{name}:{number}: more than one line: {error}") from error
        return False
    except BaseException as error:
        error.add_note(f"case {name}:{number}: python -m tests.support.fuzz --case={name}:{number}")
        raise
    return True


def lane(name: str, count: int, folder: pathlib.Path) -> tuple[int, float, float]:
    """Run the first `count` cases of a reader.

    Returns the number of accepted cases, the CPU seconds of the slowest, and the process's growth in MiB.
    """
    before, accepted, slowest = _peak_mib(), 0, 0.0
    for number in range(count):
        began = time.process_time()
        accepted += case(name, number, folder)
        slowest = max(slowest, time.process_time() - began)
        if number == 20:  # by now the reader has allocated what it always needs
            before = max(before, _peak_mib())
    return accepted, slowest, _peak_mib() - before


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Parse the command line and run the lanes, or one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--case")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if given.case:
            reader, _, number = given.case.partition(":")
            print("accepted" if case(reader, int(number), folder) else "refused")
            return
        for reader in given.readers:
            began = time.monotonic()
            accepted, slowest, grown = lane(reader, given.count, folder)
            print(
                f"{reader}: {given.count} cases in {time.monotonic() - began:.0f} s, {accepted} accepted, "
                f"the others refused; slowest {slowest:.2f} s, {grown:.0f} MiB more",
                flush=True,
            )


if __name__ == "__main__":
    main()
