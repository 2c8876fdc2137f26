"""Checks at the shapes of real models: attention beside plain JAX, one gradient twice, sampler and scorer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import scoring
from opd_jax.models import ModelConfig, attention, kv_cache
from opd_jax.tools.bench import workloads
from opd_jax.tools.bench.measure import Row, make_check
from opd_jax.types import Frozen

# Largest allowed deviation of attention in bfloat16, as a share of the norm of the array. Its inputs have
# 8 bits of fraction, and so have the weights of attention inside a fused kernel.
SHARE = 2e-2
GAP = 2e-1  # in nats, of one token's log-prob between sampler and scorer


def lengths(width: int, tile: int = 64) -> list[int]:
    """Return row lengths around the borders of a kernel's tiles, up to the full width."""
    around = {1, 2, *(n * tile + d for n in (1, 2) for d in (-1, 0, 1)), width - 1, width}
    return sorted(n for n in around if 1 <= n <= width)


def causal(config: ModelConfig, *, width: int, most_rows: int) -> list[Row]:
    """Check attention over rows and its gradient against plain JAX in float32, which takes the same inputs.

    The last rows are blank (length 1), as a micro-batch pads them. What lies behind a row's end must be
    finite, because its weight of 0 would not hide a nan.
    """
    rows = lengths(width)
    rows = [*rows[-(most_rows - 1) :], 1]
    length_B = np.array(rows, np.int32)
    shape = (len(rows), width)
    query, key, value, seen = _normal(
        (*shape, config.num_heads, config.head_dim),
        *[(*shape, config.num_kv_heads, config.head_dim)] * 2,
        (*shape, config.num_heads, config.head_dim),
    )
    real_BT = np.arange(width)[None] < length_B[:, None]
    seen = seen * real_BT[..., None, None].astype(seen.dtype)

    def both(attend: Any, dtype: Any) -> tuple[jax.Array, ...]:
        inputs = [x.astype(dtype) for x in (query, key, value)]
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, length_B), *inputs)
        return out, *back(seen.astype(dtype))

    found = jax.jit(lambda: both(attention.attend_causal, jnp.bfloat16))()
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda: both(lambda q, k, v, _: attention.blocked(q, k, v), jnp.float32))()
    where = f"{len(rows)} x {width}, {config.num_heads // config.num_kv_heads} queries a key"
    names = ("output", "dQ", "dK", "dV")
    return [
        make_check(f"check: attention {name}", where, _deviation(one, other, real_BT), SHARE)
        for name, one, other in zip(names, found, wanted, strict=True)
    ]


def cached(config: ModelConfig, *, rows: int, cache: int, live: int) -> list[Row]:
    """Check the attention of a decode step, with `live` rows of spread lengths and the others at length 1."""
    spread = lengths(cache)[-live:]
    length_B = np.array(spread + [1] * (rows - len(spread)), np.int32)
    shape = (rows, cache, config.num_kv_heads, config.head_dim)
    query, key, value = _normal((rows, config.num_heads, config.head_dim), shape, shape)
    (empty,) = kv_cache.init(dataclasses.replace(config, num_layers=1), rows, cache, jnp.bfloat16)
    full = kv_cache.place(empty, key, value, jnp.arange(rows))
    found = jax.jit(kv_cache.attend)(query, full, jnp.asarray(length_B))
    group = config.num_heads // config.num_kv_heads
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda: _exact(query, key, value, length_B, group))()
    error = _deviation(found, wanted, np.ones(rows, bool))
    where = f"{rows} x {cache}, {len(spread)} of them live"
    return [make_check("check: attention, decode", where, error, SHARE)]


def repeated(
    config: ModelConfig, *, rows: int, width: int, microbatch_tokens: int, token_chunk: int
) -> list[Row]:
    """Compute one gradient twice and say how far the two are apart; on a CPU they are equal to the bit."""
    learner = workloads.Learner(
        config, None, jnp.bfloat16,
        remat="attention", microbatch_tokens=microbatch_tokens, token_chunk=token_chunk,
    )  # fmt: skip
    batch = workloads.random_rows(config, rows, width)

    def gradient() -> Any:
        out, _ = learner.functions.accumulate(
            learner.state.params, Frozen(), batch, None, workloads.TERMS.weights
        )
        return jax.tree.map(np.asarray, out)

    first, second = (jax.tree.leaves(gradient()) for _ in range(2))
    different = sum(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    error = max(_share(a, b) for a, b in zip(first, second, strict=True))
    row = make_check("check: one gradient twice", f"{rows} x {width}", error, SHARE)
    note = f"{different} of {len(first)} arrays differ; largest share of a norm {error:.1e}"
    return [dataclasses.replace(row, note=note)]


def sampled(config: ModelConfig, *, rows: int, prompt: int, new: int) -> list[Row]:
    """Check the sampler's log-probs of long responses against the scorer's, both in bfloat16."""
    subject = workloads.random_subject(config, jnp.bfloat16)
    prompts = workloads.prompts_at_random(config, rows, prompt)
    rollout = workloads.decode(subject, prompts, new)
    scored_BT = scoring.token_logprob(subject.params, config, rollout.tokens_BT, rollout.length_B)
    gap = np.abs(np.asarray(scored_BT) - rollout.sampler_logprob_BT)[rollout.response_mask_BT]
    error = float(gap.max()) if np.isfinite(gap).all() else float("inf")
    row = make_check("check: sampler to scorer", f"{rows} x {prompt}+{new}", error, GAP)
    note = f"largest {error:.1e} nats, mean {gap.mean():.1e}, limit {GAP:g}"
    return [dataclasses.replace(row, note=note)]


def _normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in pairs]


def _exact(
    query_BNH: jax.Array, key: jax.Array, value: jax.Array, length_B: np.ndarray, group: int
) -> jax.Array:
    rows_BKGH = query_BNH.reshape(len(length_B), key.shape[2], group, -1).astype(jnp.float32)
    logits = jnp.einsum("BKGH,BSKH->BKGS", rows_BKGH, key.astype(jnp.float32))
    seen = jnp.arange(key.shape[1])[None] < length_B[:, None]
    logits = jnp.where(seen[:, None, None], logits * query_BNH.shape[-1] ** -0.5, -jnp.inf)
    out = jnp.einsum("BKGS,BSKH->BKGH", jax.nn.softmax(logits), value.astype(jnp.float32))
    return out.reshape(query_BNH.shape)


def _deviation(found: jax.Array, wanted: jax.Array, real: np.ndarray) -> float:
    """Return the largest deviation of a row as a share of its norm; infinite where anything is not finite."""
    one, other = (np.asarray(x, np.float32) for x in (found, wanted))
    if not np.isfinite(one).all():
        return float("inf")
    return max(_share(a[at], b[at]) for a, b, at in zip(one, other, real, strict=True))


def _share(one: np.ndarray, other: np.ndarray) -> float:
    norm = float(np.linalg.norm(other.astype(np.float64)))
    apart = float(np.linalg.norm(one.astype(np.float64) - other.astype(np.float64)))
    return apart / norm if norm else apart
