"""Compilation of programs before they are needed.

The programs go into the cache of compiled programs, where the run's own calls find them.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from opd_jax.aot import Program


def worthwhile() -> bool:
    """Return whether to compile ahead: on a GPU, where it takes minutes, if there is a compilation cache.

    On a CPU compilation is fast enough to leave each program to its first call.
    """
    return jax.default_backend() != "cpu" and bool(jax.config.values["jax_compilation_cache_dir"])


def threads(platform: str) -> int:
    """Return how many programs to compile at one time: one on a GPU, which tries kernels out for it.

    Two programs that do so at the same time disturb each other's timings, and worse kernels are chosen
    without a word (openxla/xla issue 41399).
    """
    return 1 if platform == "gpu" else os.cpu_count() or 1


def compile_all(programs: Sequence[Program]) -> float:
    """Compile the programs, `threads` at a time; return the seconds this took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(max_workers=threads(jax.default_backend())) as pool:
        list(pool.map(Program.compile, programs))
    return time.perf_counter() - began
