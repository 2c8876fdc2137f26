"""What a token costs with adapters beside the weights, and with them merged once a rollout.

    python -m tests.support.merge_cost        prints the table of docs/lora.md

Random weights of the shapes of `tiny` and of SmolLM2-135M, float32: one decode step on as many slots as the
recipe has, and the copy of the weights for the token loop, without and with the merge.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import models
from opd_jax.config.fields import TARGETS
from opd_jax.models import catalog, decoder, kv_cache, low_rank
from opd_jax.models.low_rank import LowRank

CASES = (("tiny", 8, 64, 160), ("HuggingFaceTB/SmolLM2-135M-Instruct", 16, 8, 384))
REPEATS = 10


def seconds(function: Callable, *args: Any) -> float:
    """The shortest of several calls."""
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - began)
    return min(found)


def decoding(config: models.ModelConfig, slots: int, positions: int) -> Callable:
    """A function of unstacked weights that decodes a token of every slot; its caches are donated."""
    token_B, position_B = (jnp.full(slots, value, jnp.int32) for value in (1, positions // 2))
    caches = kv_cache.init(config, slots, positions, jnp.float32)
    step = jax.jit(partial(decoder.decode, config=config), donate_argnames="caches")

    def one(layers: Any) -> jax.Array:
        nonlocal caches
        hidden, caches = step(layers, token_B=token_B, position_B=position_B, caches=caches)
        return hidden

    return one


def row(name: str, rank: int, slots: int, positions: int) -> str:
    """A line of the table: milliseconds of a step, and of a copy."""
    if (published := catalog.find(name)) is not None:
        config = published.model
    else:
        config = models.load_config(f"opd_jax/{name}/student")
    spec = LowRank(rank, 32.0, 1.0, TARGETS)
    config = dataclasses.replace(config, lora_scale=spec.scale)
    keys = jax.random.split(jax.random.key(0))
    joined = low_rank.join(decoder.init(keys[0], config), low_rank.init(keys[1], config, spec))
    plain = jax.jit(decoder.unstack)
    merging = jax.jit(lambda params: low_rank.merge(decoder.unstack(params), spec.scale))
    step = decoding(config, slots, positions)
    values = (seconds(step, plain(joined)), seconds(step, merging(joined)),
              seconds(plain, joined), seconds(merging, joined))  # fmt: skip
    return (
        f"| `{name}`, rank {rank}, {slots} slots | "
        + " | ".join(f"{1e3 * value:.2f}" for value in values)
        + " |"
    )


if __name__ == "__main__":
    print(
        "| model | token, beside | token, merged | copy | copy and merge |\n|---|---|---|---|---|"
    )
    for case in CASES:
        print(row(*case), flush=True)
