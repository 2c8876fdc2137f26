"""A decode step of SmolLM2-135M beside its own matrix products: how far decoding is from its floor here.

    python -m tests.support.decode_floor [BATCH]...       # 1, 8 and 32

The weights are random. The products of a step run in one program, each with weights of its own, so that
they are read from memory as in a step; those of attention read the positions that a step reads. Both are the
least of several calls; a step is the mean of a chunk of 16.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import host_memory
from opd_jax.models import Model, catalog, decoder, kv_cache
from opd_jax.rollout import SamplingParams, decode_state

START, TOTAL, STEPS = 96, 192, 16  # positions of a row at the start and at most; tokens of a chunk


def products(model: Model, batch: int, positions: int) -> Callable[[], Any]:
    """Return a call of all products of a decode step: of weights, and of queries with keys and values."""
    c = model.config
    width = kv_cache.block_widths(TOTAL)[0]
    blocks = -(-positions // width)
    keys = [jnp.ones((batch, c.num_kv_heads, c.head_dim, width)) for _ in range(c.num_layers)]
    values = [x.swapaxes(2, 3) for x in keys]
    inputs = {n: jnp.ones((batch, n)) for n in (c.hidden_size, c.intermediate_size)}
    query = jnp.ones((batch, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim))

    @jax.jit
    def run(params: Any, inputs: Any, query: jax.Array, keys: Any, values: Any) -> list[jax.Array]:
        out = []
        for layer in params["layers"]:
            kernels = [part["kernel"] for part in layer.values() if "kernel" in part]
            out += [inputs[kernel.shape[0]] @ kernel for kernel in kernels]
        out.append(decoder.logits(decoder.head(params), inputs[c.hidden_size]))
        for key, value in zip(keys, values, strict=True):
            for i in range(blocks):  # another factor each time, so that none is left out
                weights = jnp.einsum("BKGH,BKHS->BKGS", query * (i + 1.0), key)
                out.append(jnp.einsum("BKGS,BKSH->BKGH", weights, value))
        return out

    return lambda: run(model.params, inputs, query, keys, values)


def steps(model: Model, batch: int) -> Callable[[], Any]:
    """Return a call that decodes `STEPS` tokens of every row from position `START` on."""
    state = decode_state.empty(model, batch, TOTAL, 0)
    state = state.replace(
        length_B=jnp.full(batch, START, jnp.int32),
        limit_B=jnp.full(batch, TOTAL, jnp.int32),
        live_B=jnp.ones(batch, bool),
    )
    begun = [state]

    def run() -> Any:
        state = begun.pop()
        state = decode_state.decode_chunk(
            model, state, np.int32(0), SamplingParams(TOTAL), steps=STEPS
        )
        begun.append(state.replace(length_B=jnp.full(batch, START, jnp.int32)))
        return begun[0].length_B

    return run


def least(call: Callable[[], Any], calls: int = 9) -> float:
    """Return the least seconds of some calls after two."""
    times = []
    for _ in range(calls + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times[2:])


def main(batches: list[int]) -> None:
    """Print milliseconds of a step and of its products for each batch."""
    published = catalog.find("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert published is not None
    config = published.model
    params = jax.jit(decoder.init, static_argnums=1)(jax.random.key(0), config)
    model = decode_state.unstack(Model(config, params))
    for batch in batches:
        floor = least(products(model, batch, START + STEPS))
        step = least(steps(model, batch)) / STEPS
        print(
            f"batch {batch}: products {1e3 * floor:.1f} ms, decode step {1e3 * step:.1f} ms, "
            f"ratio {step / floor:.2f}"
        )


if __name__ == "__main__":
    host_memory.keep_freed()
    host_memory.configure_jax()
    main([int(text) for text in sys.argv[1:]] or [1, 8, 32])
