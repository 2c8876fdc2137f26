"""Run the cases of a suite one after another, within a time budget; a failure becomes a row."""

import dataclasses
import gc
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax

from opd_jax import hardware
from opd_jax.tools.bench import report
from opd_jax.tools.bench.measure import Row


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line.

    Attributes:
      out: the JSON file; None for none.
      model: folder of a model to measure instead of the suite's own; "" for none.
      repeats: repeats of each case after its first call.
      budget_s: no case starts after this many seconds.
      dry: run the same code at toy shapes, on any machine.
      only: run only cases whose name starts with this.
      resume: keep the rows of `out` that are complete, and measure the others.
    """

    out: pathlib.Path | None = None
    model: str = ""
    repeats: int = 3
    budget_s: float = float("inf")
    dry: bool = False
    only: str = ""
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """A case of a suite. `run` returns its rows; `needs_s` estimates its duration just before it starts.

    `always`: it runs in every call that resumes, because other cases need what it measures.
    """

    name: str
    shape: str
    run: Callable[[], Sequence[Row]]
    needs_s: Callable[[], float] = lambda: 0.0
    always: bool = False


def run_cases(
    suite: str,
    cases: Sequence[Case],
    options: Options,
    *,
    keep: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Return the rows of all cases in order; write the file after each, so that a kill loses one case.

    With `options.resume`, cases whose rows in the file are all measured do not run again, and `keep` is
    called with each of these rows. Raises ConfigError where the file is of another suite or machine.
    """
    hardware.require_supported(jax.default_backend())
    about, began = report.environment(), time.perf_counter()
    known = report.resumed(options.out, suite, about) if options.resume and options.out else {}
    rows: list[Row] = []
    for case in (case for case in cases if case.name.startswith(options.only)):
        spent = time.perf_counter() - began
        if case.name in known and not case.always:
            rows += known[case.name]
            for row in known[case.name]:
                if keep is not None:
                    keep(row)
            continue
        _print(f"{spent:6.1f} s  {case.name}  {case.shape}")
        found = _attempt(case, options.budget_s - spent)
        rows += [dataclasses.replace(row, case=case.name) for row in found]
        gc.collect()  # frees device memory that the traceback of an error refers to
        if options.out is not None:
            report.write(options.out, suite, rows, about)
    return rows


def _attempt(case: Case, left_s: float) -> Sequence[Row]:
    """Return the case's rows, or one row with the reason why there are none."""
    try:
        needs = case.needs_s()
        if left_s <= 0 or needs > left_s:
            note = f"needs {needs:.0f} s, {max(left_s, 0):.0f} s left" if needs else "no time left"
            return [Row(case.name, case.shape, status="not run", note=note)]
        return case.run()
    except Exception as error:  # any error; the next case still runs
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Row(case.name, case.shape, status="error", note=text[:600])]


def verdict(rows: Sequence[Row]) -> str:
    """Return "" where every row is as it should be, or one line that names the others."""
    bad = [row for row in rows if row.status in ("failed", "error")]
    names = ", ".join(f"{row.name} {row.shape} ({row.status})" for row in bad)
    return f"{len(bad)} of {len(rows)} rows are wrong: {names}" if bad else ""


def _print(text: str) -> None:
    """Print progress to stderr, because stdout has only the table."""
    print(text, file=sys.stderr, flush=True)


def toy_if(dry: bool, real: int, toy: int) -> int:
    """Return `real`, or `toy` in a dry run."""
    return toy if dry else real


def on_gpu() -> bool:
    """Return whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"
