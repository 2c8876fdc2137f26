"""The matrix products of a step of `tiny` alone: a floor for its scoring and its update on this machine.

    python -m tests.support.products [ROWS WIDTH]...      # 32 100 and 16 200, the micro-batches of tiny

Every product is timed by itself, the least of seven calls, with operands of the shapes that the step
has; those of attention with half of the keys, which is what a causal mask leaves.
"""

import sys
import time

import jax
import jax.numpy as jnp

from configs import stable_opd
from opd_jax import host_memory
from opd_jax.models import ModelConfig
from opd_jax.training.setup import make_setup

Product = tuple[str, tuple[int, ...], tuple[int, ...]]  # einsum, shapes of its operands


def forward(model: ModelConfig, rows: int, width: int) -> list[Product]:
    """Products of a forward pass: of the layers, and of the output matrix."""
    tokens, hidden, heads = rows * width, model.hidden_size, model.num_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    sizes = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden)]
    sizes += [(hidden, model.intermediate_size)] * 2 + [(model.intermediate_size, hidden)]
    layer: list[Product] = [("td,df->tf", (tokens, n), (n, out)) for n, out in sizes]
    queries = (rows, model.num_heads, width, model.head_dim)
    keys = (rows, model.num_heads, width // 2, model.head_dim)
    layer.append(("bnth,bnsh->bnts", queries, keys))
    layer.append(("bnts,bnsh->bnth", (*queries[:3], width // 2), keys))
    return layer * model.num_layers + [("td,df->tf", (tokens, hidden), (hidden, model.vocab_size))]


def backward(products: list[Product]) -> list[Product]:
    """For each product a @ b the two of its gradient."""
    out: list[Product] = []
    for axes, a, b in products:
        left, (right, result) = axes.split(",")[0], axes.split(",")[1].split("->")
        size = dict(zip(left, a, strict=True)) | dict(zip(right, b, strict=True))
        shape = tuple(size[axis] for axis in result)
        out += [(f"{result},{right}->{left}", shape, b), (f"{left},{result}->{right}", a, shape)]
    return out


def seconds(product: Product) -> float:
    """Return the least time of seven calls."""
    axes, *shapes = product
    function = jax.jit(lambda a, b: jnp.einsum(axes, a, b))
    operands = [jnp.ones(shape) for shape in shapes]
    times = []
    for _ in range(8):
        began = time.perf_counter()
        function(*operands).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(shapes: list[tuple[int, int]]) -> None:
    """Print seconds of the products of scoring and of a gradient, for each shape of micro-batch."""
    spec = make_setup(stable_opd.get_config("tiny")).spec
    assert spec.teacher is not None
    known: dict[Product, float] = {}

    def total(products: list[Product]) -> float:
        for product in products:
            if product not in known:
                known[product] = seconds(product)
        return sum(known[product] for product in products)

    for rows, width in shapes:
        student = forward(spec.student, rows, width)
        score = total(student) + total(forward(spec.teacher, rows, width))
        gradient = 2 * total(student) + total(backward(student))  # the reference's forward pass too
        print(f"{rows} x {width}: score {1e3 * score:.1f} ms, gradient {1e3 * gradient:.1f} ms")


if __name__ == "__main__":
    host_memory.keep_freed()
    host_memory.configure_jax()
    numbers = [int(text) for text in sys.argv[1:]] or [32, 100, 16, 200]
    main(list(zip(numbers[::2], numbers[1::2], strict=True)))
