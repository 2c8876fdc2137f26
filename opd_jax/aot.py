"""Programs with the shapes of their arguments, to compile ahead of time or to inspect."""

import dataclasses
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
