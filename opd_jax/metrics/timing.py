"""Time and memory of a step: seconds and tokens/s of its stages, peak memory."""

import pathlib
import resource
import sys
import time

import jax


class Clock:
    """Seconds and tokens/s of a step's stages."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._row: dict[str, float] = {}

    def lap(self, stage: str, tokens: float | None = None) -> None:
        """Record the stage that just ended; with `tokens`, also its tokens/s."""
        now = time.perf_counter()
        self._row[f"time/{stage}_s"] = now - self._last
        if tokens is not None:
            self._row[f"speed/{stage}_tokens_per_s"] = float(tokens) / (now - self._last)
        self._last = now

    def row(self) -> dict[str, float]:
        """Return the `time/*` and `speed/*` metrics."""
        return self._row | {"time/step_s": self._last - self._began}


def peak_gib() -> float:
    """Return the peak memory of the first device, or of the process if the device reports none (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 2**30


def used_bytes() -> float:
    """Return the bytes in use on the first device, or by the process if the device reports none (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used = stats.get("bytes_in_use")
    if used is not None:
        return used
    file = pathlib.Path("/proc/self/statm")
    if not file.is_file():
        return peak_gib() * 2**30
    return int(file.read_text().split()[1]) * resource.getpagesize()
