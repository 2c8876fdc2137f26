"""glibc's allocator on a CPU: memory that a step has freed is kept for the next one.

Every step on a CPU takes and frees gigabytes. By default glibc returns large blocks to the system at
once and faults them in again, 4 KiB at a time (docs/measurements/benchmarks.md has what that costs).
mallopt changes this inside the running process, so nothing is started twice. The arrays of a GPU do
not pass through malloc: there it is left alone.

Imports no JAX: it must be set before JAX starts threads, each of which would get an arena of its own.
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
# Of malloc.h: one arena, no block by mmap, never trim.
_OPTIONS = ((-8, 1), (-4, 0), (-1, -1))


def keep_freed(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let glibc keep freed memory, where that is wanted, and set VARIABLE to what was done.

    Left alone on GPU machines, where VARIABLE is `system`, where GLIBC_TUNABLES sets something of malloc, and
    with another C library.
    """
    done = sys.platform == "linux" and wanted(environment) and _set_options()
    environment[VARIABLE] = "keep" if done else "system"


def lines(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The line about it for the start of a run; none where the allocator was left alone."""
    if environment.get(VARIABLE) != "keep":
        return []
    told = (
        f"memory: what a step frees is kept for the next one ({VARIABLE}=system switches that off)"
    )
    return [told]


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for it: VARIABLE, or else a process that will compute on a CPU."""
    choice = environment.get(VARIABLE, "")
    if choice or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return choice == "keep"
    return not _has_accelerator(environment)


def _set_options() -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) == 1 for option in _OPTIONS)


def _has_accelerator(environment: Mapping[str, str]) -> bool:
    """Whether JAX, once imported, will find a device beside the CPU: a device file and a plug-in for it."""
    platforms = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if platforms:
        return platforms != "cpu"
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    with contextlib.suppress(ImportError, ValueError):
        plugin = importlib.util.find_spec("jax_plugins") is not None
        return plugin and any(pathlib.Path(name).exists() for name in _DEVICES)
    return False
