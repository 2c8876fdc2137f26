"""Architectures of models published on the hub, by name: to plan a run without their weights.

Each entry repeats the model's config.json on the Hugging Face hub (https://huggingface.co/NAME), where
only sizes matter here, and the number of ids of its tokenizer.
"""

import dataclasses
from typing import Any

from opd_jax.models.config import ModelConfig, from_hf


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's architecture, and the number of ids of its tokenizer (rows beyond them are padding)."""

    model: ModelConfig
    tokens: int


def find(name: str, *, rope_theta: float = 0.0, max_position: int = 0) -> Published | None:
    """Return the model of a hub name, None where it is not listed here; overrides as in `load_config`."""
    if name not in _MODELS:
        return None
    fields, tokens = _MODELS[name]
    model = from_hf(fields, source=name, rope_theta=rope_theta, max_position=max_position)
    return Published(model, tokens)


def names() -> list[str]:
    """Return the hub names that are listed."""
    return list(_MODELS)


def _fields(kind: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Return a config.json with these sizes (width, MLP width, layers, query heads, key heads, rows)."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), **more}


_QWEN_1_5B = (1536, 8960, 28, 12, 2, 151_936)
_QWEN_7B = (3584, 18_944, 28, 28, 4, 152_064)
_QWEN_32B = (5120, 27_648, 64, 40, 8, 152_064)
_TIED = {"tie_word_embeddings": True, "eos_token_id": 151_643}
_OWN_HEAD = {"tie_word_embeddings": False, "eos_token_id": 151_643}
_QWEN3 = {"eos_token_id": 151_645, "head_dim": 128, "max_position_embeddings": 40_960}
_QWEN3_TIED = _QWEN3 | {"tie_word_embeddings": True}
_SMOL = {"tie_word_embeddings": True, "eos_token_id": 0, "max_position_embeddings": 8192}

_MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen/Qwen2.5-Math-1.5B": (
        _fields("qwen2", _QWEN_1_5B, max_position_embeddings=4096, **_TIED), 151_665,
    ),
    "Qwen/Qwen2.5-Math-7B": (
        _fields("qwen2", _QWEN_7B, max_position_embeddings=4096, **_OWN_HEAD), 151_665,
    ),
    "open-thoughts/OpenThinker3-7B": (
        _fields("qwen2", _QWEN_7B, max_position_embeddings=32_768, **_OWN_HEAD), 151_665,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (
        _fields("qwen2", _QWEN_7B, max_position_embeddings=131_072, **_OWN_HEAD), 151_665,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (
        _fields("qwen2", _QWEN_32B, max_position_embeddings=131_072, **_OWN_HEAD), 151_665,
    ),
    "Qwen/Qwen3-1.7B-Base": (
        _fields("qwen3", (2048, 6144, 28, 16, 8, 151_936), **_QWEN3_TIED)
        | {"max_position_embeddings": 32_768}, 151_669,
    ),
    "Qwen/Qwen3-1.7B": (
        _fields("qwen3", (2048, 6144, 28, 16, 8, 151_936), **_QWEN3_TIED), 151_669,
    ),
    "Qwen/Qwen3-4B": (
        _fields("qwen3", (2560, 9728, 36, 32, 8, 151_936), **_QWEN3_TIED), 151_669,
    ),
    "Qwen/Qwen3-32B": (
        _fields("qwen3", (5120, 25_600, 64, 64, 8, 151_936), **_QWEN3), 151_669,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        _fields("llama", (576, 1536, 30, 9, 3, 49_152), **_SMOL), 49_152,
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        _fields("llama", (2048, 8192, 24, 32, 32, 49_152), **_SMOL), 49_152,
    ),
}  # fmt: skip
