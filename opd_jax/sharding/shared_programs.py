"""Compiled programs of several processes: all of them use one cache, or none does.

JAX writes the cache of compiled programs in process 0 alone. Where the folder is on a disk that another
process does not see, process 0 would load a program that the other one compiles; on GPUs the two may then
choose different kernels, and collectives in another order never meet (openxla/xla issue 7716).
"""

import pathlib
import time
import uuid
from typing import Any

import jax

from opd_jax.sharding import multihost

_VISIBLE_S = 5.0  # a network disk may show a new file late


def use_one_cache_or_none(*, share: bool) -> str | None:
    """Switch the cache off in every process unless all see one folder; call this before any compilation.

    `share`: on GPUs process 0 compiles what several processes run, and sends it to the others. That needs
    the cache. Returns a line for the start of the run where there is something to report, else None.
    """
    if not multihost.several():
        return None
    folder = jax.config.values["jax_compilation_cache_dir"]
    name = multihost.from_first(lambda: _write_mark(folder))
    facts = {"seen": bool(name) and _sees(pathlib.Path(folder or "") / name)}
    unseen = [i for i, other in enumerate(multihost.all_gather(facts)) if not other["seen"]]
    if multihost.first() and name:
        (pathlib.Path(folder) / name).unlink(missing_ok=True)
    if not unseen:
        # Not on CPUs: every process compiles the same code there, and process 1 never receives its first
        # program (JAX 0.10.2 and 0.11.2).
        on_gpus = jax.default_backend() == "gpu"
        jax.config.update("jax_share_binary_between_hosts", share and on_gpus)
        return None
    jax.config.update("jax_enable_compilation_cache", False)
    why = f"process {unseen[0]} does not see it" if name else "process 0 cannot write it"
    return (
        f"note: no process uses the cache of compiled programs {folder!r}, because {why}; set "
        "JAX_COMPILATION_CACHE_DIR to a folder that all processes share"
    )


def _write_mark(folder: Any) -> str:
    """Write an empty file with a new name into the folder; return the name, "" where that fails."""
    name = f".opd_jax-{uuid.uuid4().hex}"
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(folder) / name).touch()
    except (OSError, TypeError):
        return ""
    return name


def _sees(file: pathlib.Path) -> bool:
    end = time.monotonic() + _VISIBLE_S
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
