"""RoPE base and scaling as `config.json` writes them, before and since transformers 5."""

import dataclasses
from typing import Any

from opd_jax.errors import ModelError
from opd_jax.models.json_fields import Json, flag, integer, number, show

DEFAULT_THETA = 10_000.0  # of all three families in transformers


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Position scaling of RoPE: kind "linear", "llama3" or "yarn", with transformers' fields.

    A kind reads only its own fields; 0 in attention_factor, mscale and mscale_all_dim means absent.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


def read(config: Json, max_position: int, *, source: str) -> tuple[float, RopeScaling | None]:
    """Read base and scaling from `rope_parameters` (transformers >= 5) or `rope_theta` + `rope_scaling`.

    Where both are present the older `rope_scaling` wins, as it does in transformers.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            f"{source}: the RoPE field is {show(rope)}, wanted one flat object for all layers; "
            "correct the file"
        )
    theta = number(
        rope.get("rope_theta", config.get("rope_theta", DEFAULT_THETA)), "rope_theta", source
    )
    if theta <= 1:
        raise ModelError(f"{source}: rope_theta is {theta}, wanted more than 1; correct the file")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ModelError(
            f"{source}: partial_rotary_factor is {show(partial)}, but only rotation of full heads "
            "is implemented; use a checkpoint without it"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelError(
            f"{source}: RoPE scaling {show(kind)} is not implemented, wanted default, linear, "
            "llama3 or yarn; use a checkpoint with one of these"
        )
    if kind == "linear":
        return theta, RopeScaling("linear", number(rope.get("factor"), "rope factor", source))
    name = "original_max_position_embeddings"
    original = integer(config.get(name, rope.get(name, max_position)), name, source)
    if kind == "llama3":
        return theta, _llama3(rope, original, source)
    return theta, _yarn(rope, original, max_position, source)


def write(theta: float, scaling: RopeScaling | None) -> Json:
    """Return the fields that every version of transformers reads back as the same RoPE."""
    scaled: dict[str, Any] = {}
    if scaling is not None:
        scaled = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            scaled["original_max_position_embeddings"] = scaling.original_max_position
        names: tuple[str, ...] = ()
        if scaling.kind == "llama3":
            names = ("low_freq_factor", "high_freq_factor")
        elif scaling.kind == "yarn":
            optional = ("attention_factor", "mscale", "mscale_all_dim")
            present = tuple(name for name in optional if getattr(scaling, name))
            names = ("beta_fast", "beta_slow", "truncate", *present)
        scaled |= {name: getattr(scaling, name) for name in names}
    fields: Json = {
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaled,
    }
    return fields | ({"rope_scaling": scaled} if scaled else {})


def _llama3(rope: Json, original: int, source: str) -> RopeScaling:
    scaling = RopeScaling(
        "llama3",
        number(rope.get("factor"), "rope factor", source),
        low_freq_factor=number(rope.get("low_freq_factor"), "low_freq_factor", source),
        high_freq_factor=number(rope.get("high_freq_factor"), "high_freq_factor", source),
        original_max_position=original,
    )
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ModelError(
            f"{source}: low_freq_factor={scaling.low_freq_factor} is not below "
            f"high_freq_factor={scaling.high_freq_factor}; correct the file"
        )
    return scaling


def _yarn(rope: Json, original: int, max_position: int, source: str) -> RopeScaling:
    def optional(name: str, default: float = 0.0) -> float:
        value = rope.get(name)  # null and 0 mean absent, as in transformers' `or`
        return default if value is None or value == 0 else number(value, name, source)

    if rope.get("attention_factor") == 0:
        raise ModelError(
            f"{source}: attention_factor is 0, wanted a positive number; correct the file"
        )
    factor = rope.get("factor")
    scaling = RopeScaling(
        "yarn",
        max_position / original if factor is None else number(factor, "rope factor", source),
        original_max_position=original,
        beta_fast=optional("beta_fast", 32.0),
        beta_slow=optional("beta_slow", 1.0),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=flag(rope.get("truncate", True), "truncate", source),
    )
    if not scaling.beta_slow < scaling.beta_fast:
        raise ModelError(
            f"{source}: beta_slow={scaling.beta_slow} is not below "
            f"beta_fast={scaling.beta_fast}; correct the file"
        )
    return scaling
