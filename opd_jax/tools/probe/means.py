"""Means with standard errors, of one sample or of paired differences."""

import dataclasses
import math
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over `count` problems and its standard error, sd / sqrt(n); 0 where n is 1."""

    value: float
    stderr: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.stderr:.1%}"

    @property
    def signed(self) -> str:
        """A difference of fractions in percentage points, with its sign."""
        return f"{100 * self.value:+.1f} ± {100 * self.stderr:.1f} points"


def mean(values: Sequence[float]) -> Mean:
    """Return mean and standard error of at least one number."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), spread / math.sqrt(len(values)), len(values))


def paired(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Return the mean of first_i - second_i, with the standard error of these differences.

    For two models on the same problems, the difficulty of a problem cancels in the difference, so the
    error is smaller than that of two separate means.
    """
    return mean([a - b for a, b in zip(first, second, strict=True)])
