"""Compiled programs by name, before there is anything to run them on: to compile ahead, or to look at."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the arguments it will be called with; arrays may be shapes and dtypes alone."""

    name: str
    function: Callable[..., Any]
    args: tuple
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        """The compiled program; it also goes into the cache of compiled programs, where a call finds it."""
        lowered: Any = self.function
        return lowered.lower(*self.args, **self.kwargs).compile()
