"""Curves over steps: thinned for drawing, smoothed, standardised, and between two positions."""

import dataclasses
from collections.abc import Mapping

import numpy as np

POINTS = 400  # largest number of points of a drawn curve
START, NOW = 5, 10  # number of steps averaged for "at the start" and "now"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of metrics.jsonl. `step_N` increases; `value_N` is NaN where it was not finite."""

    step_N: np.ndarray
    value_N: np.ndarray

    def finite(self) -> "Curve":
        """Return the curve without the steps whose value is not finite."""
        known_N = np.isfinite(self.value_N)
        return Curve(self.step_N[known_N], self.value_N[known_N])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A curve as it is drawn: means of `per` steps each, with their minimum and maximum."""

    step_N: np.ndarray
    value_N: np.ndarray
    low_N: np.ndarray
    high_N: np.ndarray
    per: int


def thinned(curve: Curve, points: int = POINTS) -> Drawn:
    """Reduce a curve to at most `points` points; a shorter one is unchanged, with `per` = 1.

    Otherwise each point is the mean of `per` consecutive ones at their mean step; NaN where none of
    them is finite.
    """
    size = len(curve.step_N)
    if size <= points:
        return Drawn(curve.step_N, curve.value_N, curve.value_N, curve.value_N, 1)
    per = -(-size // points)
    start_N = np.arange(0, size, per)
    known = np.isfinite(curve.value_N)

    def of(function: np.ufunc, neutral: float) -> np.ndarray:
        return function.reduceat(np.where(known, curve.value_N, neutral), start_N)

    count_N = np.add.reduceat(known.astype(int), start_N)
    step_N = np.add.reduceat(curve.step_N.astype(float), start_N)
    step_N = step_N / np.diff(np.append(start_N, size))
    empty_N = count_N == 0
    value_N = np.where(empty_N, np.nan, of(np.add, 0.0) / np.maximum(count_N, 1))
    low_N = np.where(empty_N, np.nan, of(np.minimum, np.inf))
    high_N = np.where(empty_N, np.nan, of(np.maximum, -np.inf))
    return Drawn(step_N, value_N, low_N, high_N, per)


def smooth(value_N: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the finite values in a window of `width` around each point; NaN stays NaN."""
    known_N = np.isfinite(value_N)
    kernel = np.ones(width)
    total_N = np.convolve(np.where(known_N, value_N, 0.0), kernel, mode="same")
    count_N = np.convolve(known_N.astype(float), kernel, mode="same")
    return np.where(known_N, total_N / np.maximum(count_N, 1), np.nan)


def standardised(curve: Curve) -> Curve:
    """Return (x - mean) / standard deviation over the steps; 0 where the curve is flat."""
    known = curve.finite()
    if not len(known.value_N):
        return known
    spread = known.value_N.std()
    centred_N = known.value_N - known.value_N.mean()
    return Curve(known.step_N, centred_N / spread if spread > 0 else np.zeros_like(centred_N))


def ends(curve: Curve) -> tuple[float, float]:
    """Return (mean of the first five steps, mean of the last ten); the curve must have finite values."""
    value_N = curve.finite().value_N
    return float(value_N[:START].mean()), float(value_N[-NOW:].mean())


def between(curves: Mapping[str, Curve], name: str) -> dict[str, Curve]:
    """Return `score/NAME` for tokens between two positions, by "tokens 1-256", "257-512", ...

    `score/first_N/NAME` is cumulative: with n tokens and mean m at N, and n', m' at N', the tokens
    between have the mean (n' m' - n m) / (n' - n). The last part uses the metric of all tokens.
    """
    firsts = sorted(
        int(part[6:])
        for key in curves
        if key.startswith("score/first_") and key.endswith(f"/{name}")
        for part in [key.split("/")[1]]
        if part[6:].isdigit()
    )
    parts = [(n, f"rollout/first_{n}/tokens", f"score/first_{n}/{name}") for n in firsts]
    if firsts:
        parts.append((0, "rollout/tokens", f"score/{name}"))
    out, low, before = {}, 1, None
    for n, count, key in parts:
        if count not in curves or key not in curves:
            continue
        now = _sums(curves[count], curves[key])
        label = f"tokens {low}-{n}" if n else f"from {low} on"
        out[label] = _difference(now, before)
        low, before = n + 1, now
    return {label: curve for label, curve in out.items() if len(curve.step_N)}


def _sums(count: Curve, mean: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (steps, tokens, sum over them) at the steps that have both."""
    step_N, i, j = np.intersect1d(count.step_N, mean.step_N, return_indices=True)
    return step_N, count.value_N[i], count.value_N[i] * mean.value_N[j]


def _difference(now: tuple, before: tuple | None) -> Curve:
    step_N, tokens_N, sum_N = now
    if before is not None:
        step_N, i, j = np.intersect1d(step_N, before[0], return_indices=True)
        tokens_N, sum_N = tokens_N[i] - before[1][j], sum_N[i] - before[2][j]
    nonempty_N = tokens_N > 0.5
    return Curve(step_N[nonempty_N], sum_N[nonempty_N] / tokens_N[nonempty_N])
