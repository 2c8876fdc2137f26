"""What a layer keeps for its backward pass, by name; whatever is not kept is computed again."""

from collections.abc import Callable
from typing import Any

import jax

_policies = jax.checkpoint_policies


def _fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Output and softmax statistics of the fused kernel.

    By the primitive: naming its output would keep only that, and the kernel would run again for the
    statistics. The plain XLA form of attention is other primitives, none of which this keeps.
    """
    return primitive.name.startswith("dot_product_attention")


def _but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """All but weights that were gathered from slices (mesh.py): kept, they would be whole after all."""
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
    """`layer` as the body of a scan that keeps, beside its inputs, what the policy `name` says.

    none: every activation; attention: what fused attention returned; dots: that and the results of
    matrix products with weights; full: nothing; slices: what none keeps, but gathered weights.
    """
    policy = _KEEP[name]
    return layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
