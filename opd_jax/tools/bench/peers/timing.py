"""Shared code of the scripts in this folder: flags of a case, seeded prompts, timing, one line of JSON.

It uses only the standard library, because every peer has its own environment without this package.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

FIRST_ID, LAST_ID = 100, 40_000  # ordinary tokens in all measured vocabularies
# Factor on the teacher's last norm. With the student's own weights as teacher there would be nothing to
# learn, and gradients would be rounding errors.
SHARPER = 1.25
CASE = {
    "model": "",  # a Hugging Face folder with float32 safetensors
    "batch": 8,
    "prompt": 64,  # tokens of each prompt, or of each row where nothing is generated
    "new": 128,  # exact number of generated tokens
    "seed": 0,  # of the prompts
    "warmups": 1,
    "repeats": 3,
}


def read_case(description: str, **more: Any) -> argparse.Namespace:
    """Return the flags of `CASE` and of `more` (name=default); also set libraries to be quiet and offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=description)
    for name, value in (CASE | more).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def prompts(case: argparse.Namespace) -> list[list[int]]:
    """Return token ids [batch][prompt], the same in every Python version (guaranteed only for `random()`)."""
    draw = random.Random(case.seed)
    span = LAST_ID - FIRST_ID
    return [
        [FIRST_ID + int(draw.random() * span) for _ in range(case.prompt)]
        for _ in range(case.batch)
    ]


def measure(step: Callable[[], Any], case: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the seconds of the warm-ups and of the repeats; `step` must return when its work is done."""
    seconds = []
    for _ in range(case.warmups + case.repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[: case.warmups], seconds[case.warmups :]


def report(
    case: argparse.Namespace,
    seconds: tuple[list[float], list[float]],
    *,
    tokens: int,
    check: dict[str, float] | None = None,
    **more: Any,
) -> None:
    """Print the result. `check` has numbers that must be equal for both libraries."""
    warmups, repeats = seconds
    median = statistics.median(repeats)
    line = {
        "seconds": median,
        "repeats": repeats,
        "warmup": sum(warmups),
        "tokens": tokens,
        "tokens_per_second": tokens / median,
        "peak_gib": _peak_gib(),
        "prompts": zlib.crc32(json.dumps(prompts(case)).encode()),
        "check": check or {},
        "python": platform.python_version(),
    }
    print(json.dumps(line | more), flush=True)


def _peak_gib() -> float | None:
    """Return the peak resident memory of this process."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
