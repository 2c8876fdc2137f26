"""What a forward pass would have to keep from scoring to the update, were it not computed again.

    python -m tests.support.saved_activations

Bytes of the arrays that JAX saves for the backward pass of the layers, without the weights and without
logits, by `optim.remat`; counted from shapes, so nothing is computed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from configs import stable_opd
from opd_jax.models import ModelConfig, catalog, decoder
from opd_jax.training.make_setup import make_setup


def saved_bytes(config: ModelConfig, rows: int, width: int, remat: str) -> int:
    """Return the bytes of the arrays that the backward pass of the final hidden states reads."""
    tokens_BT = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    length_B = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def backward(params: Any, tokens_BT: jax.Array, length_B: jax.Array) -> Any:
        return jax.vjp(
            lambda p: decoder.hidden_states(p, config, tokens_BT, length_B, remat=remat), params
        )[1]

    params = decoder.abstract_params(config)
    saved = jax.tree.leaves(jax.eval_shape(backward, params, tokens_BT, length_B))
    weights = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
    kept = [x for x in saved if (x.shape, x.dtype) not in weights]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)


def main() -> None:
    """Print one line for each model, shape and kind of recomputation."""
    tiny = make_setup(stable_opd.get_config("tiny")).spec.student
    published = catalog.find("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert published is not None
    cases = (
        ("tiny", tiny, 64, 100),
        ("SmolLM2-135M", published.model, 8, 128),
        ("SmolLM2-135M", published.model, 8, 320),
    )
    for name, config, rows, width in cases:
        for remat in ("none", "attention", "full"):
            size = saved_bytes(config, rows, width, remat)
            print(
                f"{name}, {rows} x {width}, remat {remat}: {size / 2**30:.2f} GiB, "
                f"{size / rows / width / 1024:.0f} KiB a token"
            )


if __name__ == "__main__":
    main()
