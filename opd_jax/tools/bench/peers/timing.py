"""What the scripts of this folder share: the case as flags, prompts from a seed, timing, one JSON line.

Only the standard library: every peer lives in an environment of its own, without this package.
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

FIRST_ID, LAST_ID = 100, 40_000  # ordinary tokens of the vocabularies that are measured here
# A teacher with the student's weights would leave nothing to learn, and gradients of rounding errors:
# its last norm is multiplied by this.
SHARPER = 1.25
CASE = {
    "model": "",  # a Hugging Face folder with float32 safetensors
    "batch": 8,
    "prompt": 64,  # tokens of each prompt; of each row where nothing is generated
    "new": 128,  # tokens that are generated, exactly
    "seed": 0,  # of the prompts
    "warmups": 1,
    "repeats": 3,
}


def read_case(description: str, **more: Any) -> argparse.Namespace:
    """The flags of `CASE` and of `more` (name=default); quiet and offline from here on."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=description)
    for name, value in (CASE | more).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def prompts(case: argparse.Namespace) -> list[list[int]]:
    """Token ids [batch][prompt], the same in every Python (only `random()` is promised to be)."""
    draw = random.Random(case.seed)
    span = LAST_ID - FIRST_ID
    return [
        [FIRST_ID + int(draw.random() * span) for _ in range(case.prompt)]
        for _ in range(case.batch)
    ]


def measure(step: Callable[[], Any], case: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of the warm-ups and of the repeats; `step` returns when its work is done."""
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
    """Print the result. `check` holds numbers in which both sides must agree."""
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
    """Highest resident memory of this process."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
