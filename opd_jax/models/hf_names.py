"""Names and layouts of the parameter tree's leaves in a Hugging Face checkpoint."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# Leaf of a layer -> (name in the file, transposed). Dense kernels are [in, out] in the parameter tree.
_LAYER = {
    "attention_norm.scale": ("input_layernorm.weight", False),
    "query.kernel": ("self_attn.q_proj.weight", True),
    "query.bias": ("self_attn.q_proj.bias", False),
    "key.kernel": ("self_attn.k_proj.weight", True),
    "key.bias": ("self_attn.k_proj.bias", False),
    "value.kernel": ("self_attn.v_proj.weight", True),
    "value.bias": ("self_attn.v_proj.bias", False),
    "query_norm.scale": ("self_attn.q_norm.weight", False),
    "key_norm.scale": ("self_attn.k_norm.weight", False),
    "output.kernel": ("self_attn.o_proj.weight", True),
    "mlp_norm.scale": ("post_attention_layernorm.weight", False),
    "gate.kernel": ("mlp.gate_proj.weight", True),
    "up.kernel": ("mlp.up_proj.weight", True),
    "down.kernel": ("mlp.down_proj.weight", True),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOP = {"embed.embedding": EMBEDDING, "norm.scale": "model.norm.weight", "head.kernel": HEAD}


_KNOWN = re.compile(
    r"model\.layers\.\d+\.(" + "|".join(re.escape(name) for name, _ in _LAYER.values()) + ")"
)


class Part(NamedTuple):
    """One tensor of a file: its name, its layer in our stacked leaf (None: the full leaf), transposed."""

    name: str
    layer: int | None
    transposed: bool


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the name, such as `layers.query.kernel`, of a key path of jax.tree_util."""
    return ".".join(str(key.key) for key in path)


def parts(leaf: str, layers: int) -> Iterator[Part]:
    """Yield the tensors that make up a leaf, in the order of its layers."""
    if leaf.startswith("layers."):
        name, transposed = _LAYER[leaf.removeprefix("layers.")]
        for i in range(layers):
            yield Part(f"model.layers.{i}.{name}", i, transposed)
    else:
        yield Part(_TOP[leaf], None, False)


def is_known(name: str) -> bool:
    """Return whether some model has a tensor of this name, in any layer."""
    return name in _TOP.values() or _KNOWN.fullmatch(name) is not None
