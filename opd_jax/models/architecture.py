"""`ModelConfig`: what the decoder needs to know of a Hugging Face `config.json`, checked."""

import dataclasses
import difflib
from typing import Any

from opd_jax.errors import ModelError

SUPPORTED = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Position scaling of RoPE: kind "linear" or "llama3", with the fields of transformers' config."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


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
    max_position: int  # longest prompt + response the model was made for
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    rope_scaling: RopeScaling | None = None


def from_hf(config: dict[str, Any], *, source: str) -> ModelConfig:
    """Read a Hugging Face config (`config.json` as a dict); `source` names it in errors.

    Raises ModelError for another architecture, a missing or impossible field, or a feature that
    would change the logits and is not implemented (sliding windows, unknown RoPE scaling).
    """
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        near = difflib.get_close_matches(str(kind), SUPPORTED, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ModelError(
            f"{source}: model_type is {kind!r}{hint}, wanted one of {', '.join(SUPPORTED)}; "
            "use a checkpoint of one of these families"
        )

    def integer(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{source}: {name} is {value!r}, wanted a positive integer; "
                "download the folder again or correct the file"
            )
        return value

    _refuse_unsupported(config, source)
    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    kv_heads = integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}; correct the file"
        )
    head_dim = integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise ModelError(
            f"{source}: head_dim={head_dim} is odd, RoPE wants an even one; correct it"
        )
    theta, scaling = _rope(config, source)
    return ModelConfig(
        model_type=kind,
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size"),
        num_layers=integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", source),
        max_position=integer("max_position_embeddings"),
        tie_embeddings=_flag(config, "tie_word_embeddings", source),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        eos_token_ids=eos_ids(config.get("eos_token_id"), source=source),
        rope_scaling=scaling,
    )


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as the same model."""
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model.model_type]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if scaling := model.rope_scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    config: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
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
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model.eos_token_ids:
        ids = list(model.eos_token_ids)
        config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return config


def eos_ids(value: Any, *, source: str) -> tuple[int, ...]:
    """`eos_token_id` as written by transformers (absent, a number or a list), as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ModelError(
            f"{source}: eos_token_id is {value!r}, wanted a token id or a list of them"
        )
    return tuple(dict.fromkeys(ids))


def _flag(config: dict[str, Any], name: str, source: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise ModelError(f"{source}: {name} is {value!r}, wanted true or false; correct the file")
    return value


def _number(value: Any, name: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelError(
            f"{source}: {name} is {value!r}, wanted a positive number; correct the file"
        )
    return float(value)


def _refuse_unsupported(config: dict[str, Any], source: str) -> None:
    layers = str(config.get("layer_types"))  # a list of names, if the file is in order
    sliding = config.get("use_sliding_window") or "sliding_attention" in layers
    for bad, what in (
        (sliding, "sliding-window attention is on (use_sliding_window / layer_types)"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act={config.get('hidden_act')!r}"),
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


def _rope(config: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers >= 5) or `rope_theta` + `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(
            f"{source}: the RoPE field is {rope!r}, wanted an object; correct the file"
        )
    theta = _number(
        rope.get("rope_theta", config.get("rope_theta", 10_000.0)), "rope_theta", source
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(rope.get("factor"), "rope factor", source))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings")
        scaling = RopeScaling(
            "llama3",
            _number(rope.get("factor"), "rope factor", source),
            _number(rope.get("low_freq_factor"), "low_freq_factor", source),
            _number(rope.get("high_freq_factor"), "high_freq_factor", source),
            int(_number(original, "original_max_position_embeddings", source)),
        )
        if not scaling.low_freq_factor < scaling.high_freq_factor:
            raise ModelError(
                f"{source}: low_freq_factor={scaling.low_freq_factor} is not below "
                f"high_freq_factor={scaling.high_freq_factor}; correct the file"
            )
        return theta, scaling
    raise ModelError(
        f"{source}: RoPE scaling {kind!r} is not implemented, wanted default, linear or llama3; "
        "use a checkpoint with one of these"
    )
