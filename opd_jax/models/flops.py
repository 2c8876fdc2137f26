"""Lower bounds of work: operations and bytes of each stage, counted from the shapes alone.

A multiplication and an addition are two operations. The counts include the matrix products, attention
over real tokens (not padding), and the bytes that no implementation can avoid: weights once per pass,
keys and values of live positions. They omit norms, biases, rotations, softmax and sampling (under 1 % of
both from a width of 500 on), and recomputation: a fraction of the roofline counts that as time lost.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one stage: it takes at least max(flops / matrix rate, bytes / bandwidth) seconds."""

    flops: float
    bytes: float


def matrix_parameters(config: ModelConfig) -> int:
    """Count the weights of the layers' matrices: query, key, value, output, and three of the MLP."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def head_parameters(config: ModelConfig) -> int:
    """Count the weights of the output matrix, V D."""
    return config.vocab_size * config.hidden_size


def all_parameters(config: ModelConfig) -> int:
    """Count all trained parameters, norms and biases included, which the optimizer updates."""
    c = config
    biases = c.head_dim * (c.num_heads + 2 * c.num_kv_heads) if c.qkv_bias else 0
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    ends = head_parameters(c) * (1 if c.tie_embeddings else 2) + c.hidden_size
    return matrix_parameters(c) + c.num_layers * (biases + norms) + ends


def cache_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Return the bytes of the keys and values of one position in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Return the operations of scores and weighted values for `pairs` (query, key) positions, all layers."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs


def decode_step(config: ModelConfig, *, rows: int, positions: float, itemsize: int) -> Work:
    """Return the work of one token for `rows` sequences that attend to `positions` positions in total.

    Weights and head are read once; the keys and values of every live position are read, and each row's
    new ones are written.
    """
    weights = matrix_parameters(config) + head_parameters(config)
    return Work(
        flops=2.0 * weights * rows + attention_flops(config, positions),
        bytes=itemsize * weights + cache_bytes_per_token(config, itemsize) * (positions + rows),
    )


def decode(
    config: ModelConfig,
    prompt_B: Sequence[int] | np.ndarray,
    response_B: Sequence[int] | np.ndarray,
    *,
    itemsize: int,
) -> list[Work]:
    """Return the work of decoding the rows together from the start, one `Work` per step.

    Step t of a row reads its prompt and t - 1 tokens of the response, the input token included.
    """
    prompt_B, response_B = np.asarray(prompt_B), np.asarray(response_B)
    works = []
    for t in range(int(response_B.max())):
        live = response_B > t
        positions = float((prompt_B[live] + t).sum())
        works.append(
            decode_step(config, rows=int(live.sum()), positions=positions, itemsize=itemsize)
        )
    return works


def forward(
    config: ModelConfig, length_B: Sequence[int] | np.ndarray, *, itemsize: int, head: bool = True
) -> Work:
    """Return the work of a forward pass over the rows, with the logits of every token (`head`) or without.

    It takes 2 operations per weight and token; causal attention of a row of T has T (T + 1) / 2 pairs.
    """
    length_B = np.asarray(length_B, np.float64)
    weights = matrix_parameters(config) + (head_parameters(config) if head else 0)
    pairs = float((length_B * (length_B + 1) / 2).sum())
    return Work(
        flops=2.0 * weights * float(length_B.sum()) + attention_flops(config, pairs),
        bytes=float(itemsize * weights),
    )


def prefill(
    config: ModelConfig, length_B: Sequence[int] | np.ndarray, *, itemsize: int
) -> list[Work]:
    """Return the work of a pass over the prompts that stores their keys and values, without logits."""
    work = forward(config, length_B, itemsize=itemsize, head=False)
    written = cache_bytes_per_token(config, itemsize) * float(np.sum(length_B))
    return [Work(work.flops, work.bytes + written)]


def update(
    config: ModelConfig, length_B: Sequence[int] | np.ndarray, *, itemsize: int
) -> list[Work]:
    """Return the work of forward and backward (twice the forward's operations, no recomputation) and AdamW.

    AdamW reads weight, gradient and two moments and writes all but the gradient, in float32.
    """
    once = forward(config, length_B, itemsize=itemsize)
    both = Work(3 * once.flops, 3 * once.bytes)
    return [both, Work(0.0, 7.0 * 4 * all_parameters(config))]


def floor_seconds(
    works: Sequence[Work], *, flops_per_s: float, bytes_per_s: float
) -> tuple[float, str]:
    """Return the least time these stages take one after another, and the ceiling that limits most of it."""
    compute = sum(
        w.flops / flops_per_s for w in works if w.flops / flops_per_s > w.bytes / bytes_per_s
    )
    memory = sum(
        w.bytes / bytes_per_s for w in works if w.flops / flops_per_s <= w.bytes / bytes_per_s
    )
    return compute + memory, "compute" if compute > memory else "memory"
