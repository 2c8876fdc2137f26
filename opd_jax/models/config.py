"""`ModelConfig`: the fields of a Hugging Face `config.json` that the decoder needs, checked."""

import dataclasses
import difflib
from typing import Any

from opd_jax.errors import ModelError
from opd_jax.models import rope_config
from opd_jax.models.json_fields import LARGEST, flag, integer, number, show
from opd_jax.models.rope_config import RopeScaling

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

# Defaults of transformers for fields that config.json leaves out. The sizes have no default here:
# a file without them is broken, even if transformers accepts it.
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _QWEN | {"num_key_value_heads": None, "max_position_embeddings": 2048,
                      "eos_token_id": 2},
    "mistral": _QWEN | {"num_key_value_heads": 8, "max_position_embeddings": 131_072,
                        "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU. Hashable, so static in jit."""

    model_type: str
    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position: int  # longest prompt + response that the model supports
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    rope_scaling: RopeScaling | None = None
    lora_scale: float = 1.0  # s of x W + s (x A) B, where weights have adapters (low_rank.py)


def from_hf(
    config: dict[str, Any], *, source: str, rope_theta: float = 0.0, max_position: int = 0
) -> ModelConfig:
    """Read a Hugging Face config (`config.json` as a dict); `source` names it in errors.

    A missing field has the default of transformers; the sizes are required. `rope_theta` and
    `max_position` replace the values of the file; 0 keeps them.

    Raises ModelError for another architecture, a missing or impossible field, or a feature that
    would change the logits and is not implemented (sliding windows, unknown RoPE scaling).
    """
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        near = difflib.get_close_matches(str(kind), SUPPORTED, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ModelError(
            f"{source}: model_type is {show(kind)}{hint}, wanted one of {', '.join(SUPPORTED)}; "
            "use a checkpoint of one of these families"
        )
    config = _DEFAULTS[kind] | config | _overrides(config, source, rope_theta, max_position)

    def size(name: str, when_null: int | None = None) -> int:
        value = config.get(name)
        return integer(when_null if value is None else value, name, source)

    _refuse_unsupported(config, source)
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads} (32 where a Qwen config leaves it out); "
            "correct the file"
        )
    head_dim = size("head_dim", hidden // heads)
    if head_dim % 2:
        raise ModelError(
            f"{source}: head_dim={head_dim} is odd, RoPE needs an even one; correct the file"
        )
    positions = size("max_position_embeddings")
    theta, rope_scaling = rope_config.read(config, positions, source=source)
    vocab_size = size("vocab_size")
    return ModelConfig(
        model_type=kind,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=number(config["rms_norm_eps"], "rms_norm_eps", source),
        max_position=positions,
        tie_embeddings=flag(config.get("tie_word_embeddings"), "tie_word_embeddings", source),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        eos_token_ids=eos_ids(config.get("eos_token_id"), vocab_size, source=source),
        rope_scaling=rope_scaling,
    )


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` that transformers reads back as the same model."""
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    ids = list(model.eos_token_ids)
    # In a Mistral config a missing window is one of 4096.
    no_window = {"sliding_window": None} if model.model_type == "mistral" else {}
    return (
        {
            "architectures": [f"{name[model.model_type]}ForCausalLM"],
            "model_type": model.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_position,
            "rms_norm_eps": model.rms_norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            # Written even where there is none: in a Llama config a missing value means 2.
            "eos_token_id": None if not ids else ids[0] if len(ids) == 1 else ids,
        }
        | no_window
        | rope_config.write(model.rope_theta, model.rope_scaling)
    )


def eos_ids(value: Any, vocab_size: int, *, source: str) -> tuple[int, ...]:
    """Return `eos_token_id` as transformers writes it (absent, a number or a list) as a tuple.

    Raises ModelError for a value that is no token id or not in the vocabulary: such a model never stops.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ModelError(
            f"{source}: eos_token_id is {show(value)}, wanted a token id or a list of them; "
            "correct the file"
        )
    if ids and max(ids) >= vocab_size:
        raise ModelError(
            f"{source}: eos_token_id is {show(value)}, which the vocabulary of {vocab_size} ids "
            "does not contain, so no answer would end; correct the file"
        )
    return tuple(dict.fromkeys(ids))


def _refuse_unsupported(config: dict[str, Any], source: str) -> None:
    layers = str(config.get("layer_types"))  # a list of names in a valid file
    sliding = config.get("use_sliding_window") or "sliding_attention" in layers
    sliding = sliding or (
        config["model_type"] == "mistral" and config["sliding_window"] is not None
    )
    for bad, what in (
        (
            sliding,
            "sliding-window attention is on (use_sliding_window / layer_types, of Mistral sliding_window)",
        ),
        (config["hidden_act"] != "silu", f"hidden_act={show(config['hidden_act'])}"),
        (config.get("mlp_bias"), "mlp_bias is on"),
        (
            config.get("model_type") != "qwen2" and config.get("attention_bias"),
            "attention_bias is on",
        ),
        (config.get("quantization_config"), "the weights are quantised"),
    ):
        if bad:
            raise ModelError(
                f"{source}: {what}, which would change the logits and is not implemented; "
                "use a checkpoint without it"
            )


def _overrides(
    config: dict[str, Any], source: str, rope_theta: float, max_position: int
) -> dict[str, Any]:
    """Return the fields that the two overrides replace, checked."""
    changes: dict[str, Any] = {}
    if _is_set(rope_theta):
        if not (isinstance(rope_theta, int | float) and 1 < rope_theta < 1e12):
            raise ModelError(
                f"{source}: rope_theta is overridden by {show(rope_theta)}, wanted a number above "
                "1, or 0 to keep the file's; correct the override"
            )
        changes["rope_theta"] = rope_theta
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(config.get(name), dict):
                changes[name] = config[name] | {"rope_theta": rope_theta}
    if _is_set(max_position):
        if not (isinstance(max_position, int) and 1 < max_position <= LARGEST):
            raise ModelError(
                f"{source}: max_position is overridden by {show(max_position)}, wanted an integer "
                f"from 2 to {LARGEST}, or 0 to keep the file's; correct the override"
            )
        changes["max_position_embeddings"] = max_position
    return changes


def _is_set(override: Any) -> bool:
    """Return whether an override is set: only the number 0 keeps the file's value; False and None do not."""
    return isinstance(override, bool) or override != 0
