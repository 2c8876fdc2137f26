"""Compiled programs: with the shapes of their arguments, ahead of time, and their cache on the disk."""

import dataclasses
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the arguments of a future call; arrays may be shapes and dtypes alone."""

    name: str
    function: Callable[..., Any]
    args: tuple
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        """Compile and return the program; a call finds the result in the compilation cache."""
        lowered: Any = self.function
        return lowered.lower(*self.args, **self.kwargs).compile()


def cache_programs(environment: Mapping[str, str] = os.environ) -> None:
    """Cache compiled programs for later runs, in JAX_COMPILATION_CACHE_DIR or else in ~/.cache.

    A cache that cannot be read or written costs one line, and the compilation of what it lacks.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        base = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(base) / "opd_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.showwarning = _one_line_of_cache(str(folder), warnings.showwarning)


def _one_line_of_cache(folder: str, show: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints the first of JAX's warnings about the cache as a line."""
    printed = False

    def show_once(message: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal printed
        text = str(message)
        if "persistent compilation cache entry" not in text:
            show(message, *args, **kwargs)
        elif not printed:
            printed = True
            print(
                f"note: cannot read or write the cache of compiled programs in {folder!r} "
                f"({' '.join(text.split(': ', 1)[-1].split())}); programs are compiled again; delete the "
                "folder, or set JAX_COMPILATION_CACHE_DIR to another one",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    return show_once
