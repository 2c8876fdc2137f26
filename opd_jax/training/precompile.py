"""Compiling programs before they are needed.

What is compiled here goes into the cache of compiled programs, from which the run's own calls take it.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from opd_jax.aot import Program


def worthwhile() -> bool:
    """Whether to compile ahead: on a GPU, where it takes minutes, and where programs are kept.

    On a CPU the programs that a run meets are compiled soon enough as it meets them.
    """
    return jax.default_backend() != "cpu" and bool(jax.config.values["jax_compilation_cache_dir"])


def compile_all(programs: Sequence[Program]) -> float:
    """Compile them, a few at a time; the seconds that took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(Program.compile, programs))
    return time.perf_counter() - began
