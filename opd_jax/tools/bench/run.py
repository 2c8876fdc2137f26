"""Runs the cases of a suite one after another: a failing one leaves its error, time is kept."""

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
    """What the command line says.

    Attributes:
      out: the JSON file; None for none.
      model: folder of a model to measure beside the shapes of a suite; "" for none.
      repeats: of each case after its first call.
      budget_s: no case is begun after so many seconds.
      dry: the same code at toy shapes, on whatever machine.
      only: of the cases those whose name begins so.
    """

    out: pathlib.Path | None = None
    model: str = ""
    repeats: int = 3
    budget_s: float = float("inf")
    dry: bool = False
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of a suite. `run` makes its rows; `needs_s` says, when its turn comes, how long it takes."""

    name: str
    shape: str
    run: Callable[[], Sequence[Row]]
    needs_s: Callable[[], float] = lambda: 0.0


def run_cases(suite: str, cases: Sequence[Case], options: Options) -> list[Row]:
    """The rows of all cases in order; the file is written anew after each, so a kill loses one."""
    hardware.require_supported(jax.default_backend())
    about, began = report.environment(), time.perf_counter()
    rows: list[Row] = []
    for case in (case for case in cases if case.name.startswith(options.only)):
        spent = time.perf_counter() - began
        _say(f"{spent:6.1f} s  {case.name}  {case.shape}")
        rows += _attempt(case, options.budget_s - spent)
        gc.collect()  # frees device memory that an error's traceback holds
        if options.out is not None:
            report.write(options.out, suite, rows, about)
    return rows


def _attempt(case: Case, left_s: float) -> Sequence[Row]:
    """The case's rows, or one that says why there are none."""
    try:
        needs = case.needs_s()
        if left_s <= 0 or needs > left_s:
            note = f"{max(left_s, 0):.0f} s left, wanted {needs:.0f} s" if needs else "no time left"
            return [Row(case.name, case.shape, status="not run", note=note)]
        return case.run()
    except Exception as error:  # whatever it is, the next case still runs
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Row(case.name, case.shape, status="error", note=text[:600])]


def _say(text: str) -> None:
    """Progress goes to stderr: stdout has the table alone."""
    print(text, file=sys.stderr, flush=True)


def toy_if(dry: bool, real: int, toy: int) -> int:
    """A size: the real one, or the toy's in a dry run."""
    return toy if dry else real


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"
