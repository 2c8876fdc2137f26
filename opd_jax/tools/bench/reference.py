"""The decoder in plain numpy float64, the reference for results of a GPU. Slow; for tiny models only."""

from typing import Any

import numpy as np

from opd_jax.models import ModelConfig

Tree = dict[str, Any]


def logprobs(params: Tree, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Return log p(token t | tokens before t) of one row without padding, float64 [T]; 0 at t = 0.

    `params` is the decoder's tree in any dtype; rope_scaling is not supported.
    """
    assert config.rope_scaling is None
    tree = _float64(params)
    x_TD = tree["embed"]["embedding"][tokens]
    for i in range(config.num_layers):
        x_TD = _layer({k: {n: w[i] for n, w in v.items()} for k, v in tree["layers"].items()},
                      config, x_TD)  # fmt: skip
    x_TD = _norm(x_TD, tree["norm"]["scale"], config.rms_norm_eps)
    head_VD = tree["head"]["kernel"] if "head" in tree else tree["embed"]["embedding"]
    logits_TV = x_TD @ head_VD.T
    top_T1 = logits_TV.max(axis=-1, keepdims=True)
    logprob_TV = logits_TV - top_T1 - np.log(np.exp(logits_TV - top_T1).sum(axis=-1, keepdims=True))
    out_T = np.zeros(len(tokens))
    for t in range(1, len(tokens)):
        out_T[t] = logprob_TV[t - 1, tokens[t]]
    return out_T


def nll(params: Tree, config: ModelConfig, rows: list[np.ndarray]) -> float:
    """Return the mean negative log-prob of all tokens except each row's first."""
    total = sum(float(logprobs(params, config, row).sum()) for row in rows)
    return -total / sum(len(row) - 1 for row in rows)


def slope(
    params: Tree,
    direction: Tree,
    config: ModelConfig,
    rows: list[np.ndarray],
    *,
    size: float = 1e-5,
) -> float:
    """Return the derivative of `nll` along a direction, by central differences in float64."""
    base, along = _float64(params), _float64(direction)

    def moved(by: float) -> float:
        return nll(_combine(base, along, by), config, rows)

    return (moved(size) - moved(-size)) / (2 * size)


def _layer(weights: Tree, config: ModelConfig, x_TD: np.ndarray) -> np.ndarray:
    time, heads, kv_heads, size = len(x_TD), config.num_heads, config.num_kv_heads, config.head_dim
    y_TD = _norm(x_TD, weights["attention_norm"]["scale"], config.rms_norm_eps)

    def project(name: str, count: int) -> np.ndarray:
        y = y_TD @ weights[name]["kernel"] + weights[name].get("bias", 0.0)
        return y.reshape(time, count, size)

    query, key, value = (
        project("query", heads),
        project("key", kv_heads),
        project("value", kv_heads),
    )
    if config.qk_norm:
        query = _norm(query, weights["query_norm"]["scale"], config.rms_norm_eps)
        key = _norm(key, weights["key_norm"]["scale"], config.rms_norm_eps)
    query, key = _rotate(query, config), _rotate(key, config)
    attended = np.zeros_like(query)
    hidden_TT = np.triu(np.ones((time, time), bool), 1)
    for n in range(heads):
        k = n // (heads // kv_heads)
        score_TT = np.where(hidden_TT, -np.inf, query[:, n] @ key[:, k].T / np.sqrt(size))
        weight_TT = np.exp(score_TT - score_TT.max(axis=-1, keepdims=True))
        attended[:, n] = weight_TT / weight_TT.sum(axis=-1, keepdims=True) @ value[:, k]
    x_TD = x_TD + attended.reshape(time, heads * size) @ weights["output"]["kernel"]
    y_TD = _norm(x_TD, weights["mlp_norm"]["scale"], config.rms_norm_eps)
    gate = y_TD @ weights["gate"]["kernel"]
    gate = gate / (1.0 + np.exp(-gate))
    return x_TD + (gate * (y_TD @ weights["up"]["kernel"])) @ weights["down"]["kernel"]


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def _rotate(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rotate pairs (i, i + H/2) of [T, n, H] by t theta^(-2i/H)."""
    half = config.head_dim // 2
    speed = config.rope_theta ** (-np.arange(half) / half)
    angle = (np.arange(len(x))[:, None] * speed)[:, None]
    left, right = x[..., :half], x[..., half:]
    return np.concatenate(
        [
            left * np.cos(angle) - right * np.sin(angle),
            right * np.cos(angle) + left * np.sin(angle),
        ],
        axis=-1,
    )


def _float64(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree).astype(np.float64)


def _combine(base: Any, along: Any, by: float) -> Any:
    if isinstance(base, dict):
        return {name: _combine(part, along[name], by) for name, part in base.items()}
    return base + by * along
