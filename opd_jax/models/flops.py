"""What a piece of work costs at least: operations and bytes counted from the shapes alone.

A multiplication and an addition are two operations. Counted are the matrix products, attention over
the tokens that are there (not the padding), and the bytes that no implementation can do without:
weights once a pass, keys and values of live positions. Norms, biases, rotations, softmax and sampling
are left out (under 1 % of both from a width of 500 on), and so is whatever is computed twice: a
fraction of the roofline counts recomputation as time lost.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """One stage: it takes at least max(flops / matrix rate, bytes / bandwidth) seconds."""

    flops: float
    bytes: float


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of the layers' matrices: query, key, value, output, and three of the MLP."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def head_parameters(config: ModelConfig) -> int:
    """Weights of the output matrix, V D."""
    return config.vocab_size * config.hidden_size


def all_parameters(config: ModelConfig) -> int:
    """Every trained number, of norms and biases as well: what the optimizer walks over."""
    c = config
    biases = c.head_dim * (c.num_heads + 2 * c.num_kv_heads) if c.qkv_bias else 0
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    ends = head_parameters(c) * (1 if c.tie_embeddings else 2) + c.hidden_size
    return matrix_parameters(c) + c.num_layers * (biases + norms) + ends


def cache_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Keys and values of one position in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Scores and weighted values of that many (query position, key position) pairs, all layers."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs


def decode_step(config: ModelConfig, *, rows: int, positions: float, itemsize: int) -> Work:
    """One token for `rows` sequences that attend to `positions` positions altogether.

    Weights and head are read once; each live position's keys and values are read, each row's new
    ones written.
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
    """Every step of decoding the rows together, all from the start: one `Work` a step.

    Step t of a row reads its prompt and t - 1 tokens of the response, the one it is fed included.
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
    """A pass over whole rows, with the logits of every token (`head`) or without.

    2 operations a weight and token; causal attention of a row of T has T (T + 1) / 2 pairs.
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
    """A pass over the prompts that leaves their keys and values, without logits."""
    work = forward(config, length_B, itemsize=itemsize, head=False)
    written = cache_bytes_per_token(config, itemsize) * float(np.sum(length_B))
    return [Work(work.flops, work.bytes + written)]


def update(
    config: ModelConfig, length_B: Sequence[int] | np.ndarray, *, itemsize: int
) -> list[Work]:
    """Forward and backward (twice the forward's operations), nothing recomputed; then AdamW.

    AdamW reads weight, gradient and two moments and writes all but the gradient, in float32.
    """
    once = forward(config, length_B, itemsize=itemsize)
    both = Work(3 * once.flops, 3 * once.bytes)
    return [both, Work(0.0, 7.0 * 4 * all_parameters(config))]


def floor_seconds(
    works: Sequence[Work], *, flops_per_s: float, bytes_per_s: float
) -> tuple[float, str]:
    """The least time these stages take one after another, and which ceiling most of it is under."""
    compute = sum(
        w.flops / flops_per_s for w in works if w.flops / flops_per_s > w.bytes / bytes_per_s
    )
    memory = sum(
        w.bytes / bytes_per_s for w in works if w.flops / flops_per_s <= w.bytes / bytes_per_s
    )
    return compute + memory, "compute" if compute > memory else "memory"
