"""A/B measurements of open design choices: attention of a decode step, and CUDA graphs of the token loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import ModelConfig, decoder, flops
from opd_jax.models import kv_cache as model_cache
from opd_jax.models.flops import Work
from opd_jax.tools.bench import workloads
from opd_jax.tools.bench.cases import Bench
from opd_jax.tools.bench.measure import Row, watch_memory
from opd_jax.tools.bench.run import on_gpu

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# The complete token loop in one CUDA graph. WHILE has no effect without the minimum of 1.
WHILE_GRAPH: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,"
    "CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}


def grouped(query_BNH: jax.Array, key: jax.Array, value: jax.Array, length_B: jax.Array) -> Any:
    """Fused attention with the query heads of each key head as rows, so that keys are read once."""
    batch, heads, size = query_BNH.shape
    group = heads // key.shape[2]
    rows = query_BNH.reshape(batch, -1, group, size).swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        rows, key, value,
        query_seq_lengths=jnp.full_like(length_B, group), key_value_seq_lengths=length_B,
        implementation=_fused(),
    )  # fmt: skip
    return out.swapaxes(1, 2).reshape(query_BNH.shape)


def plain(query_BNH: jax.Array, key: jax.Array, value: jax.Array, length_B: jax.Array) -> Any:
    """Fused attention with one query row and the kernel's own grouped-query attention."""
    out = jax.nn.dot_product_attention(
        query_BNH[:, None], key, value,
        query_seq_lengths=jnp.ones_like(length_B), key_value_seq_lengths=length_B,
        implementation=_fused(),
    )  # fmt: skip
    return out[:, 0]


def einsum(query_BNH: jax.Array, key: jax.Array, value: jax.Array, length_B: jax.Array) -> Any:
    """Attention as two matrix products by XLA; reads the complete cache, whatever the lengths."""
    batch, _, size = query_BNH.shape
    rows = query_BNH.reshape(batch, key.shape[2], -1, size)
    score = jnp.einsum("BKGH,BSKH->BKGS", rows, key, preferred_element_type=jnp.float32)
    live = jnp.arange(key.shape[1])[None] < length_B[:, None]
    weight = jax.nn.softmax(jnp.where(live[:, None, None], score * size**-0.5, -jnp.inf), axis=-1)
    out = jnp.einsum("BKGS,BSKH->BKGH", weight.astype(value.dtype), value)
    return out.reshape(query_BNH.shape)


ATTENTIONS: dict[str, Attention] = {
    "fused, heads as rows": grouped,
    "fused, plain GQA": plain,
    "einsum": einsum,
}


def attention(bench: Bench, name: str, config: ModelConfig, *, rows: int, cache: int) -> list[Row]:
    """Measure decode attention of one layer, with cache lengths spread evenly from 1 to `cache`."""
    length_B = np.linspace(1, cache, rows).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (rows, cache, config.num_kv_heads, config.head_dim)
    query = jax.random.normal(keys[0], (rows, config.num_heads, config.head_dim), jnp.bfloat16)
    key, value = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[1:])
    fn, calls = jax.jit(ATTENTIONS[name]), 20
    with watch_memory() as peak:
        timing = bench.time(lambda: [fn(query, key, value, length_B) for _ in range(calls)][-1])
    expected = np.asarray(jax.jit(einsum)(query, key, value, length_B), np.float32)
    actual = np.asarray(fn(query, key, value, length_B), np.float32)
    live = float(length_B.sum())
    bytes_once = 2.0 * live * config.num_kv_heads * config.head_dim * 2
    work = Work(4.0 * live * config.num_heads * config.head_dim, bytes_once)
    return bench.row(
        f"A/B attention: {name}", f"{rows} x {cache}", timing,
        tokens=rows * calls, works=[work] * calls, peak=peak(),
        note=f"{timing.median_s / calls * 1e6:.0f} us a call; differs from einsum by at most "
        f"{np.abs(actual - expected).max():.1e}",
    )  # fmt: skip


def graphs(
    bench: Bench, name: str, config: ModelConfig, dtype: Any, *, rows: int, cache: int, steps: int
) -> list[Row]:
    """Measure a greedy loop with the default command buffers, or with the complete loop in one graph."""
    params = jax.jit(decoder.unstack)(workloads.random_subject(config, dtype).params)
    options = WHILE_GRAPH if name == "WHILE" and on_gpu() else {}
    start = cache // 4

    @functools.partial(jax.jit, donate_argnums=(1,))
    def loop(params: Any, caches: Any, token_B: jax.Array) -> tuple[Any, jax.Array]:
        def body(carry: tuple) -> tuple:
            step, token_B, caches = carry
            position_B = jnp.full_like(token_B, start) + step
            hidden_BD, caches = decoder.decode(params, config, token_B, position_B, caches)
            logits_BV = decoder.logits(decoder.head(params), hidden_BD)
            return step + 1, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), caches

        first = (jnp.zeros((), jnp.int32), token_B, caches)
        _, token_B, caches = jax.lax.while_loop(lambda carry: carry[0] < steps, body, first)
        return caches, token_B

    token_B = jnp.zeros(rows, jnp.int32)
    caches = [model_cache.init(config, rows, cache, jnp.dtype(dtype))]
    with watch_memory() as peak:
        compiled = loop.lower(params, caches[0], token_B).compile(compiler_options=options)

        def run() -> jax.Array:
            caches[0], next_B = compiled(params, caches[0], token_B)
            return next_B

        timing = bench.time(run)
    itemsize = np.dtype(dtype).itemsize
    works = flops.decode(config, [start + 1] * rows, [steps] * rows, itemsize=itemsize)
    return bench.row(
        f"A/B command buffers: {name}", f"{rows} x {cache}, {start} full", timing,
        tokens=rows * steps, works=works, peak=peak(),
        note=f"{timing.median_s / steps * 1e3:.2f} ms per step",
    )  # fmt: skip


def _fused() -> Any:
    return "cudnn" if on_gpu() else "xla"
