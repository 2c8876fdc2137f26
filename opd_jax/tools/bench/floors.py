"""The floor of a stage: its own matrix products alone, measured in the run that measures the stage.

The products of many tokens are timed layer by layer, with operands of the shapes that the stage has; those
of attention with half of the keys, which is what a causal mask leaves. The products of a decode step run
in one program, each with weights of its own, so that they are read from memory as in a step.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.models import Model, ModelConfig, decoder, kv_cache

Product = tuple[str, tuple[int, ...], tuple[int, ...]]  # einsum, shapes of its operands


def layer(model: ModelConfig, rows: int, width: int) -> list[Product]:
    """Return the products of one layer's forward pass over full rows."""
    tokens, hidden, heads = rows * width, model.hidden_size, model.num_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    sizes = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden)]
    sizes += [(hidden, model.intermediate_size)] * 2 + [(model.intermediate_size, hidden)]
    out: list[Product] = [("td,df->tf", (tokens, n), (n, size)) for n, size in sizes]
    queries = (rows, model.num_heads, width, model.head_dim)
    keys = (rows, model.num_heads, width // 2, model.head_dim)
    out.append(("bnth,bnsh->bnts", queries, keys))
    out.append(("bnts,bnsh->bnth", (*queries[:3], width // 2), keys))
    return out


def output(model: ModelConfig, tokens: int) -> list[Product]:
    """Return the product that makes the logits of so many tokens; none for 0."""
    shapes = (tokens, model.hidden_size), (model.hidden_size, model.vocab_size)
    return [("td,df->tf", *shapes)] if tokens else []


def backward(products: Sequence[Product]) -> list[Product]:
    """Return the two products of the gradient of each product a @ b."""
    out: list[Product] = []
    for axes, a, b in products:
        left, (right, result) = axes.split(",")[0], axes.split(",")[1].split("->")
        size = dict(zip(left, a, strict=True)) | dict(zip(right, b, strict=True))
        shape = tuple(size[axis] for axis in result)
        out += [(f"{result},{right}->{left}", shape, b), (f"{left},{result}->{right}", a, shape)]
    return out


def decode_step(model: Model, batch: int, total: int, positions: int) -> Callable[[], Any]:
    """Return a call of all products of a decode step, in one program.

    `model` is unstacked. Rows have `total` positions, of which a step reads `positions`, in blocks of the
    plain cache (models/kv_cache.py).
    """
    c = model.config
    dtype = decoder.head(model.params).dtype
    width = kv_cache.block_widths(total)[0]
    blocks = -(-positions // width)
    keys = [
        jnp.ones((batch, c.num_kv_heads, c.head_dim, width), dtype) for _ in range(c.num_layers)
    ]
    values = [x.swapaxes(2, 3) for x in keys]
    # Every width that a kernel reads; heads x head_dim need not be the hidden size.
    sizes = {c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim}
    inputs = {n: jnp.ones((batch, n), dtype) for n in sizes}
    query = jnp.ones((batch, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim), dtype)

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


def least(call: Callable[[], Any], calls: int = 7) -> float:
    """Return the least seconds of `calls` calls, after two that are not counted."""
    times = []
    for _ in range(calls + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times[2:])


@dataclasses.dataclass
class Floors:
    """Measured products. Those that belong together run in one program, the least of a few calls.

    Attributes:
      dtype: of the operands.
      known: seconds by products.
    """

    dtype: Any = jnp.float32
    known: dict[tuple[Product, ...], float] = dataclasses.field(default_factory=dict)

    def seconds(self, products: Sequence[Product]) -> float:
        """Return the seconds of the products, each with operands of its own; 0 for none."""
        together = tuple(products)
        if together and together not in self.known:
            self.known[together] = self._measured(together)
        return self.known.get(together, 0.0)

    def forward(
        self, model: ModelConfig, rows: int, width: int, *, logits: int, most_tokens: int
    ) -> float:
        """Return the seconds of a forward pass over full rows, with the logits of `logits` tokens of each.

        The rows are divided into micro-batches of at most `most_tokens` tokens, as a stage divides them.
        """
        return sum(
            times
            * (
                model.num_layers * self.seconds(layer(model, count, width))
                + self.seconds(output(model, count * logits))
            )
            for count, times in _micro_batches(rows, width, most_tokens)
        )

    def backward(
        self, model: ModelConfig, rows: int, width: int, *, logits: int, most_tokens: int
    ) -> float:
        """Return the seconds of the backward pass of `forward` with the same arguments."""
        return sum(
            times
            * (
                model.num_layers * self.seconds(backward(layer(model, count, width)))
                + self.seconds(backward(output(model, count * logits)))
            )
            for count, times in _micro_batches(rows, width, most_tokens)
        )

    def _measured(self, products: Sequence[Product]) -> float:
        axes = [axes for axes, *_ in products]
        operands = [[jnp.ones(shape, self.dtype) for shape in shapes] for _, *shapes in products]

        @jax.jit
        def run(operands: list[list[jax.Array]]) -> list[jax.Array]:
            return [jnp.einsum(a, *pair) for a, pair in zip(axes, operands, strict=True)]

        return least(lambda: run(operands))


def _micro_batches(rows: int, width: int, most_tokens: int) -> list[tuple[int, int]]:
    """Return (rows, number) of the micro-batches of each size."""
    each = min(max(most_tokens // width, 1), rows)
    full, rest = divmod(rows, each)
    return [(each, full), *([(rest, 1)] if rest else [])]
