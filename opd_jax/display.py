"""What a person sees while a run goes on, and the table it ends with."""

import collections
import os
import sys
import time


class Progress:
    """The live display: one line that redraws itself on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, first: int):
        self._steps, self._first = steps, first
        self._live = sys.stdout.isatty()
        self._said = 0.0
        self._recent: collections.deque[float] = collections.deque(maxlen=20)  # seconds a step

    def step(self, step: int, row: dict[str, float]) -> None:
        """Show a finished step: rates, the figures to watch, and the time left."""
        shown = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        shown.append(f"{row['time/step_s']:.2f} s/step")
        if step > self._first + 1:  # the first step is mostly compilation
            self._recent.append(row["time/step_s"])
            left = int(sum(self._recent) / len(self._recent) * (self._steps - step))
            shown.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        for name, key, form in (
            ("reverse KL", "score/reverse_kl", ".3f"), ("SFT", "loss/sft", ".3f"),
            ("truncated", "rollout/truncation_rate", ".0%"),
            ("repetitive", "rollout/repetition_rate", ".0%"),
            ("length", "rollout/length_mean", ".0f"), ("grad", "optim/grad_norm", ".2f"),
        ):  # fmt: skip
            if key in row:
                shown.append(f"{name} {row[key]:{form}}")
        if "speed/rollout_tokens_per_s" in row:
            shown.append(f"{row['speed/rollout_tokens_per_s']:,.0f} tok/s sampled")
        line = "  ".join(shown)
        if self._live:
            width = os.get_terminal_size().columns
            print("\r\x1b[K" + line[: width - 1], end="", flush=True)
        elif step in (self._first + 1, self._steps) or time.monotonic() - self._said > 10:
            print(line, flush=True)
            self._said = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        print(("\r\x1b[K" if self._live else "") + text, flush=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """The closing table: who, accuracy with standard error, TruncRate, RepRate, mean length."""
    lines = [f"{'':16}{'accuracy':>16}{'TruncRate':>12}{'RepRate':>10}{'mean length':>13}"]
    for name, row in rows.items():
        accuracy = f"{row['accuracy']:.1%} ± {row['stderr']:.1%}"
        lines.append(
            f"{name:16}{accuracy:>16}{row['truncation_rate']:>12.1%}"
            f"{row['repetition_rate']:>10.1%}{row['length_mean']:>13.1f}"
        )
    return "\n".join(lines)
