"""glibc's allocator on a CPU: keep the memory that a step frees for the next step.

Every step on a CPU allocates and frees gigabytes. By default glibc returns large blocks to the system
immediately, and new ones page-fault again, 4 KiB at a time (the cost is in
docs/measurements/benchmarks.md). mallopt changes this inside the running process, so no second process
is needed. The arrays of a GPU are not allocated by malloc, so there the allocator is left alone.

glibc keeps freed memory only in the arena of the main thread: in those of other threads it unmaps whole
heaps whatever the options say. So JAX computes in the thread that calls it. A single arena for all threads
would do, too, but the threads that compile then wait for each other, which takes two thirds more time.
With several CPU devices XLA computes in threads of its own, and their memory is not kept.

This module imports JAX only in `configure_jax`: the options must be set before JAX starts threads.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping, MutableMapping

VARIABLE = "OPD_JAX_MALLOC"  # keep | system; unset: keep on a CPU
_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and either under WSL
# Options of malloc.h: no blocks by mmap, no trimming.
_OPTIONS = ((-4, 0), (-1, -1))


def keep_freed(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let glibc keep freed memory, where the environment allows it, and set VARIABLE to the result.

    The allocator is left alone on GPU machines, where VARIABLE is `system`, where GLIBC_TUNABLES sets an
    option of malloc, and with another C library.
    """
    done = sys.platform == "linux" and is_wanted(environment) and _set_options()
    environment[VARIABLE] = "keep" if done else "system"


def configure_jax(environment: Mapping[str, str] = os.environ) -> None:
    """Let JAX compute in the calling thread where freed memory is kept. Call it before JAX computes."""
    if environment.get(VARIABLE) == "keep":
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def lines(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the line about this for the start of a run; none where the allocator was left alone."""
    if environment.get(VARIABLE) != "keep":
        return []
    return [
        f"memory: what a step frees is kept for the next one ({VARIABLE}=system switches that off)"
    ]


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Return whether to keep freed memory: as VARIABLE says, by default if the process computes on a CPU."""
    choice = environment.get(VARIABLE, "")
    if choice or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return choice == "keep"
    return not _has_accelerator(environment)


def _set_options() -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) == 1 for option in _OPTIONS)


def _has_accelerator(environment: Mapping[str, str]) -> bool:
    """Return whether JAX will find an accelerator: there is a device file and a plug-in for it."""
    platforms = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if platforms:
        return platforms != "cpu"
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    with contextlib.suppress(ImportError, ValueError):
        plugin = importlib.util.find_spec("jax_plugins") is not None
        return plugin and any(pathlib.Path(name).exists() for name in _DEVICES)
    return False
