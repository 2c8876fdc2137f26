"""A decode step beside its own matrix products: how far decoding is from its floor here.

    python -m tests.support.decode_floor [BATCH]...         # SmolLM2-135M: 1, 8 and 32
    python -m tests.support.decode_floor tiny [BATCH]...    # the embedded student: 64, 48, 32 and 16

The weights of SmolLM2-135M are random. The products of a step run in one program, each with weights of its
own, so that they are read from memory as in a step; those of attention read the positions that a step
reads (opd_jax/tools/bench/floors.py). Both are the least of several calls; a step is the mean of a chunk
of 16.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import host_memory
from opd_jax.models import Model, catalog, decoder, load
from opd_jax.rollout import SamplingParams, decode_state
from opd_jax.tools.bench import floors
from opd_jax.tools.bench.cpu import TINY

START, TOTAL, STEPS = 96, 192, 16  # positions of a row at the start and at most; tokens of a chunk


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


def subject(name: str) -> Model:
    """Return the model of this name, unstacked."""
    if name == "tiny":
        config, params = load(str(TINY))
    else:
        published = catalog.find("HuggingFaceTB/SmolLM2-135M-Instruct")
        assert published is not None
        config = published.model
        params = jax.jit(decoder.init, static_argnums=1)(jax.random.key(0), config)
    return decode_state.unstack(Model(config, params))


def main(model: Model, batches: list[int]) -> None:
    """Print milliseconds of a step and of its products for each batch."""
    for batch in batches:
        floor = floors.least(floors.decode_step(model, batch, TOTAL, START + STEPS))
        step = floors.least(steps(model, batch), calls=9) / STEPS
        print(
            f"batch {batch}: products {1e3 * floor:.2f} ms, decode step {1e3 * step:.2f} ms, "
            f"ratio {step / floor:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    host_memory.keep_freed()
    host_memory.configure_jax()
    texts = sys.argv[1:]
    chosen = "tiny" if "tiny" in texts else "smollm2"
    numbers = [int(text) for text in texts if text != "tiny"]
    main(subject(chosen), numbers or ([64, 48, 32, 16] if chosen == "tiny" else [1, 8, 32]))
