"""Correctness of the device: log-probs and gradients against float64, decoding against scoring."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import scoring
from opd_jax.models import Model, ModelConfig, decoder
from opd_jax.rollout import Batching, SamplingParams, row_keys, sample_responses
from opd_jax.tools.bench import reference
from opd_jax.tools.bench.measure import Row, make_check
from opd_jax.training import objective, update
from opd_jax.training.terms import default_terms
from opd_jax.types import Frozen, GoldenRows

# Head size and width that cuDNN's fused attention supports.
CONFIG = ModelConfig(
    model_type="qwen2", vocab_size=1000, hidden_size=256, intermediate_size=512, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=64, rope_theta=1e4, rms_norm_eps=1e-6, max_position=512,
    tie_embeddings=True, qkv_bias=True, qk_norm=False, eos_token_ids=(),
)  # fmt: skip
LENGTHS, WIDTH = (64, 33, 17, 2), 64
# Largest allowed deviation, in nats of a log-prob and as a fraction of a leaf's gradient norm. A GPU rounds
# the factors of float32 products to 10 bits (TF32) by default; bfloat16 has 8.
LOGPROB = {"float32": 1e-2, "bfloat16": 2e-1}
GRADIENT = {"float32": 1e-2, "bfloat16": 6e-2}


def logprobs(dtype: str) -> list[Row]:
    """Check the scorer's log-probs for a batch of four rows of different lengths."""
    params, rows = weights(), token_rows()
    tokens_BT, length_B = _batch(rows)
    logprob_BT = scoring.token_logprob(_cast(params, dtype), CONFIG, tokens_BT, length_B)
    error = _largest(
        np.asarray(logprob_BT)[i, : len(row)] - reference.logprobs(params, CONFIG, row)
        for i, row in enumerate(rows)
    )
    return [make_check("check: log-probs", f"{dtype} to float64", error, LOGPROB[dtype])]


def decoding(dtype: str) -> list[Row]:
    """Check the sampler's log-probs against the scorer's and against float64."""
    params = weights()
    cast_params = _cast(params, dtype)
    prompts = [row[:n].tolist() for row, n in zip(token_rows(), (40, 17, 5, 1), strict=True)]
    rollout = sample_responses(
        Model(CONFIG, cast_params), prompts, SamplingParams(24),
        keys=row_keys(jax.random.key(0), len(prompts)), batching=Batching(slots=2, chunk=8),
    )  # fmt: skip
    scored_BT = scoring.token_logprob(cast_params, CONFIG, rollout.tokens_BT, rollout.length_B)
    mask_BT = rollout.response_mask_BT
    gap = (np.asarray(scored_BT) - rollout.sampler_logprob_BT)[mask_BT]
    exact = []
    for i, length in enumerate(rollout.length_B):
        row_T = reference.logprobs(params, CONFIG, rollout.tokens_BT[i, :length])
        exact.append((row_T - rollout.sampler_logprob_BT[i, :length])[mask_BT[i, :length]])
    limit = LOGPROB[dtype]
    return [
        make_check("check: decoding", f"{dtype} to scoring", _largest([gap]), limit),
        make_check("check: decoding", f"{dtype} to float64", _largest(exact), limit),
    ]


def gradients(dtype: str) -> list[Row]:
    """Check the gradient of the mean log-prob of every leaf, along itself plus a random direction.

    The error is the largest |slope in float64 - <gradient, direction>| / |gradient| over leaves.
    """
    params, rows = weights(), token_rows()
    tokens_BT, length_B = _batch(rows)
    mask_BT = np.arange(WIDTH)[None] < length_B[:, None]
    mask_BT[:, 0] = False
    terms = default_terms(pg_weight=0.0, lambda_gold=1.0)
    loss = objective.make_golden_loss(terms, CONFIG, token_chunk=256, remat="none")
    accumulate = update.make_accumulate(
        None, loss, microbatch_tokens=len(rows) * WIDTH, dtype=jnp.dtype(dtype)
    )
    weight_BT = (mask_BT / mask_BT.sum()).astype(np.float32)
    gradient, _ = accumulate(
        jax.tree.map(jnp.asarray, params), Frozen(), None,
        GoldenRows(tokens_BT=tokens_BT, length_B=length_B, weight_BT=weight_BT),
        terms.weights,
    )  # fmt: skip
    gradient = jax.tree.map(lambda g: np.asarray(g, np.float64), gradient)
    draw, errors = np.random.default_rng(2), []
    for name, leaf in _leaves(gradient):
        size = float(np.linalg.norm(leaf))
        noise = draw.standard_normal(leaf.shape)
        along = leaf / size + noise / np.linalg.norm(noise)
        exact = reference.slope(params, _only(gradient, name, along), CONFIG, rows)
        errors.append(abs(exact - float((leaf * along).sum())) / size)
    return [make_check("check: gradients", f"{dtype} to float64", max(errors), GRADIENT[dtype])]


def weights() -> dict[str, Any]:
    """Return random weights, biases and norms as host float32 arrays with values that bfloat16 has."""
    draw = np.random.default_rng(0)

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        noise = draw.standard_normal(like.shape) * (0.1 if name == "embedding" else 0.06)
        return (noise + (name == "scale")).astype(jnp.bfloat16).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract_params(CONFIG))


def token_rows() -> list[np.ndarray]:
    """Return random tokens, one array per row, of very different lengths."""
    draw = np.random.default_rng(1)
    return [draw.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in LENGTHS]


def _batch(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.zeros((len(rows), WIDTH), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    return tokens_BT, np.array([len(row) for row in rows], np.int32)


def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params)


def _largest(parts: Any) -> float:
    return float(max(np.abs(part).max() for part in parts))


def _leaves(tree: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for key, part in tree.items():
        if isinstance(part, dict):
            yield from _leaves(part, (*name, key))
        else:
            yield (*name, key), part


def _only(tree: Any, name: tuple[str, ...], value: np.ndarray, at: tuple[str, ...] = ()) -> Any:
    """Return the tree with `value` at `name` and zeros elsewhere."""
    if isinstance(tree, dict):
        return {key: _only(part, name, value, (*at, key)) for key, part in tree.items()}
    return value if at == name else np.zeros_like(tree)
