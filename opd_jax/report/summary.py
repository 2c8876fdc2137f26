"""Summary of a run, for a terminal of 100 columns."""

import textwrap
from collections.abc import Sequence

import numpy as np

from opd_jax.report.curves import Curve, ends
from opd_jax.report.figures import letter
from opd_jax.report.read import Run
from opd_jax.report.text import line

WIDTH = 100
_BARS, _CELLS = "▁▂▃▄▅▆▇█", 30
# (key, title, format); eval/* stands for the first benchmark.
_ROWS = (
    ("rollout/truncation_rate", "TruncRate", ".1%"),
    ("rollout/repetition_rate", "RepRate", ".1%"),
    ("rollout/accuracy", "accuracy of rollouts", ".1%"),
    ("rollout/length_mean", "response length", ".1f"),
    ("eval/*/accuracy", "held-out accuracy", ".1%"),
    ("eval/*/truncation_rate", "held-out TruncRate", ".1%"),
    ("eval/*/repetition_rate", "held-out RepRate", ".1%"),
    ("score/advantage_mean", "advantage", ".3f"),
    ("score/student_logprob_mean", "student log-prob", ".3f"),
    ("score/teacher_logprob_mean", "teacher log-prob", ".3f"),
    ("score/reverse_kl", "reverse KL", ".3f"),
    ("score/span_log_ratio", "span log-ratio", ".3f"),
    ("score/overlap_ratio", "overlap ratio", ".3f"),
    ("score/entropy_gap", "entropy gap", ".3f"),
    ("score/repeated_token_fraction", "repetitive tokens", ".1%"),
    ("optim/grad_norm", "gradient norm", ".3g"),
    ("loss/total", "loss", ".4g"),
    ("loss/sft", "SFT loss", ".4g"),
    ("time/step_s", "seconds a step", ".2f"),
    ("memory/peak_gib", "peak memory, GiB", ".2f"),
)


def summary(runs: Sequence[Run]) -> str:
    """Return for each run its verdict, the guard's events, and a table of the key figures."""
    return "\n\n".join(_one(i, run) for i, run in enumerate(runs))


def _one(i: int, run: Run) -> str:
    steps = run.config.get("steps")
    of = f" of {steps}" if type(steps) is int else ""
    out = [line(f"{letter(i)}  {run.name}: step {run.last}{of}, {run.lines} lines", WIDTH)]
    out += _wrapped(run.verdict.text)
    for event in run.events[-5:]:
        out += _wrapped(f"guard, step {event.step}: {event.text}")
    for note in run.notes:
        out += _wrapped(f"note: {note}")
    table = [_row(run, *row) for row in _ROWS]
    shown = [row for row in table if row]
    if shown:
        head = ("", "start", "now", "least", "most")
        out.append(
            f"{head[0]:22}"
            + "".join(f"{cell:>10}" for cell in head[1:])
            + "  least to most; shares: 0 to 1"
        )
        out += shown
    return "\n".join(out)


def sparkline(curve: Curve, cells: int = _CELLS, *, share: bool = False) -> str:
    """Draw the curve as bars of eight heights; a cell is the mean of its steps.

    The heights span its minimum to its maximum, or 0 to 1 where it is a share.
    """
    known = curve.finite()
    parts = np.array_split(known.value_N, min(cells, len(known.value_N)))
    means = np.array([part.mean() for part in parts])
    low, high = (0.0, 1.0) if share else (means.min(), means.max())
    means = np.clip(means, low, high)
    if not high > low:
        return _BARS[0] * len(means)
    return "".join(_BARS[int(x)] for x in np.round((means - low) / (high - low) * 7))


def _row(run: Run, key: str, name: str, form: str) -> str:
    if "*" in key:
        key = key.replace("*", run.benchmarks[0]) if run.benchmarks else ""
    curve = run.curves.get(key)
    if curve is None or not len(known := curve.finite().value_N):
        return ""
    cells = (*ends(curve), known.min(), known.max())
    if key.startswith("eval/"):  # evaluations are few: show the first and the last, not means
        cells = (known[0], known[-1], *cells[2:])
    bars = sparkline(curve, share=form == ".1%")
    return f"{name:22}" + "".join(f"{_cell(cell, form):>10}" for cell in cells) + f"  {bars}"


def _cell(value: float, form: str) -> str:
    return f"{value:{form}}" if abs(value) < 1e5 else f"{value:.2g}"


def _wrapped(text: str) -> list[str]:
    flat = line(text, 20 * WIDTH)
    return textwrap.wrap(flat, WIDTH, initial_indent="   ", subsequent_indent="   ")
