"""Measure the limits of the machine: bandwidth of a memory copy and rate of matrix products."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.models import ModelConfig
from opd_jax.tools.bench.measure import Row, make_row, time_call


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read and written), and operations per second of the best matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def limits(self) -> dict[str, float]:
        """Return the limits as arguments of `measure.make_row`."""
        return {"bytes_per_s": self.bytes_per_s, "flops_per_s": self.flops_per_s}


def measure(
    products: Sequence[tuple[int, int, int]], *, dtype: Any, copy_gib: float, repeats: int
) -> tuple[Ceilings, list[Row]]:
    """Return the limits of this machine, and a row for each measurement.

    Args:
      products: (rows, inner, columns) of the matrix products to measure.
      dtype: of the matrices and of the results.
      copy_gib: size of the array to copy, far larger than the caches.
    """
    rows = [_copy(copy_gib, repeats)]
    rows += [_product(shape, dtype, repeats) for shape in dict.fromkeys(products)]
    rates = [(row.bytes or 0.0, row.flops or 0.0, row.median_s or 1.0) for row in rows]
    limits = Ceilings(
        bytes_per_s=rates[0][0] / rates[0][2],
        flops_per_s=max(flops / seconds for _, flops, seconds in rates[1:]),
    )
    return limits, rows


def products_of(config: ModelConfig, rows: int) -> list[tuple[int, int, int]]:
    """Return the shapes of the model's two largest products for `rows` rows: MLP input and logits."""
    width = config.hidden_size
    return [(rows, width, config.intermediate_size), (rows, width, config.vocab_size)]


def _copy(gib: float, repeats: int) -> Row:
    """Measure x + 1 on a donated float32 array: each byte is read once and written once."""
    calls, step = 4, jax.jit(lambda x: x + 1.0, donate_argnums=0)
    kept = [jnp.zeros(max(int(gib * 2**30 / 4), 1), jnp.float32)]
    size = kept[0].nbytes

    def run() -> jax.Array:
        for _ in range(calls):
            kept[0] = step(kept[0])
        return kept[0]

    timing = time_call(run, repeats=repeats)
    moved = 2.0 * size * calls
    row = make_row("ceiling: copy", f"{gib:g} GiB x {calls}", timing)
    rate = moved / timing.median_s / 1e9
    return dataclasses.replace(row, bytes=moved, note=f"{rate:,.1f} GB/s")


def _product(shape: tuple[int, int, int], dtype: Any, repeats: int) -> Row:
    """Measure a matrix product of random numbers, repeated on a GPU to take at least about a millisecond."""
    rows, inner, columns = shape
    flops_once = 2.0 * rows * inner * columns
    calls = max(1, min(50, int(1e12 / flops_once))) if jax.default_backend() == "gpu" else 1
    left_key, right_key = jax.random.split(jax.random.key(0))
    left = jax.random.normal(left_key, (rows, inner), dtype)
    right = jax.random.normal(right_key, (inner, columns), dtype)
    multiply = jax.jit(jnp.matmul)

    def run() -> jax.Array:
        return [multiply(left, right) for _ in range(calls)][-1]

    timing = time_call(run, repeats=max(repeats, 5))
    name = jnp.dtype(dtype).name
    row = make_row("ceiling: product", f"{rows}x{inner}x{columns} {name}", timing)
    flops = flops_once * calls
    return dataclasses.replace(
        row, flops=flops, note=f"{flops / timing.median_s / 1e12:,.3f} TFLOP/s"
    )
