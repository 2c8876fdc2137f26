"""Console output: the progress line of a run, and the table at its end."""

import collections
import os
import sys
import time
from collections.abc import Collection, Sequence


class Progress:
    """The progress display: one line that is redrawn on a terminal, separate lines elsewhere."""

    def __init__(self, steps: int, first: int, *, silent: bool = False):
        self._silent = silent
        self._steps, self._first = steps, first
        self._live = sys.stdout.isatty()
        self._printed_at = 0.0
        self._recent: collections.deque[float] = collections.deque(maxlen=20)  # seconds per step

    def step(self, step: int, row: dict[str, float]) -> None:
        """Show a finished step: its metrics, its duration, and the estimated time left."""
        shown = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        shown.append(f"{row['time/step_s']:.2f} s/step")
        if step > self._first + 1:  # the first step is mostly compilation
            self._recent.append(row["time/step_s"])
            left = int(sum(self._recent) / len(self._recent) * (self._steps - step))
            shown.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        for name, key, form in (
            ("reverse KL", "score/reverse_kl", ".3f"),
            ("span log-ratio", "score/span_log_ratio", "+.3f"), ("SFT", "loss/sft", ".3f"),
            ("truncated", "rollout/truncation_rate", ".0%"),
            ("repetitive", "rollout/repetition_rate", ".0%"),
            ("length", "rollout/length_mean", ".0f"), ("grad", "optim/grad_norm", ".2f"),
        ):  # fmt: skip
            if key in row:
                shown.append(f"{name} {row[key]:{form}}")
        if "speed/rollout_tokens_per_s" in row:
            shown.append(f"{row['speed/rollout_tokens_per_s']:,.0f} tok/s sampled")
        self.show("  ".join(shown), always=step in (self._first + 1, self._steps))

    def show(self, line: str, *, always: bool) -> None:
        """Redraw the progress line. Where lines are not redrawn, print at most one in ten seconds,
        unless `always` is set.
        """
        if self._silent:
            return
        if self._live:
            width = os.get_terminal_size().columns
            print("\r\x1b[K" + line[: width - 1], end="", flush=True)
        elif always or time.monotonic() - self._printed_at > 10:
            print(line, flush=True)
            self._printed_at = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that the progress display does not overwrite."""
        if not self._silent:
            print(("\r\x1b[K" if self._live else "") + text, flush=True)


def headline(summary: dict[str, float]) -> str:
    """Return the main figures of an evaluation in one line, for the output during a run."""
    shown = {"accuracy": "held-out accuracy", "matched": "answers that match"}
    return ", ".join(f"{text} {summary[key]:.1%}" for key, text in shown.items() if key in summary)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the table of a run's evaluations: accuracy ± standard error, TruncRate, RepRate, mean length.

    It has a column `match` where responses were compared with `eval.match`.
    """
    columns = {
        "accuracy": lambda row: f"{row['accuracy']:.1%} ± {row['stderr']:.1%}",
        "match": lambda row: f"{row['matched']:.1%}",
        "TruncRate": lambda row: f"{row['truncation_rate']:.1%}",
        "RepRate": lambda row: f"{row['repetition_rate']:.1%}",
        "mean length": lambda row: f"{row['length_mean']:.1f}",
    }
    for name, key in (("accuracy", "accuracy"), ("match", "matched")):
        if not all(key in row for row in rows.values()):
            del columns[name]
    width = {name: 16 if name == "accuracy" else max(len(name) + 3, 9) for name in columns}
    lines = [" " * 16 + "".join(f"{name:>{width[name]}}" for name in columns)]
    for name, row in rows.items():
        cells = (f"{show(row):>{width[name]}}" for name, show in columns.items())
        lines.append(f"{name:16}" + "".join(cells))
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> list[str]:
    """Format rows of cells as lines. Columns in `left` are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
