"""Shapes by suffix: the capital letters at the end of a name are the dimensions of the array.

B sequences   P prompts   G rollouts per prompt   T tokens (prompt ++ response ++ padding)
S cache slots V vocabulary   D model width   F mlp width   L layers
N query heads K key/value heads, or teachers   H head size   C tokens of one chunk
X candidates (top-k), or spans of text   Z periods of a cycle
U ids of a teacher with another tokenizer
"""

from typing import Any

from opd_jax.errors import ShapeError


def check_shapes(**arrays: Any) -> dict[str, int]:
    """Read sizes from suffixes and compare: `check_shapes(logprob_BT=x, mask_BT=m)` -> {"B": .., "T": ..}.

    Runs at trace time only. Raises ShapeError that names both arrays.
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, array in arrays.items():
        dims = name.rsplit("_", 1)[-1]
        if len(dims) != len(array.shape):
            raise ShapeError(
                f"{name}: got shape {tuple(array.shape)}, wanted {len(dims)} dimensions ({dims})"
            )
        for dim, size in zip(dims, array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ShapeError(
                    f"{name}: got {dim}={size}, but {first[dim]} has {dim}={sizes[dim]}"
                )
            first.setdefault(dim, name)
    return sizes
