"""Which activations a layer saves for its backward pass; the others are recomputed."""

from collections.abc import Callable
from typing import Any

import jax

_policies = jax.checkpoint_policies


def _fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Save output and softmax statistics of the fused kernel.

    The policy tests the primitive: naming its output would save only that, and the kernel would run again
    for the statistics. The plain XLA implementation consists of other primitives, which it does not save.
    """
    return primitive.name.startswith("dot_product_attention")


def _but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Save everything except gathered weights (mesh.py): to save them would undo their sharding."""
    return primitive.name != "all_gather"


_KEEP: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "attention": _fused_attention,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _fused_attention
    ),
    "full": _policies.nothing_saveable,
    "slices": _but_gathered,
}
POLICIES = ("none", "attention", "dots", "full")  # of `optim.remat`


def checkpointed(layer: Callable, name: str) -> Callable:
    """Wrap `layer`, the body of a scan, to save its inputs and what the policy `name` selects.

    none: every activation but weights of plain attention; attention: the results of fused attention; dots:
    those and the results of matrix products with weights; full: nothing; slices: as none, without gathered
    weights.
    """
    policy = _KEEP[name]
    return layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
