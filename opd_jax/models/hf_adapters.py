"""Adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT and vLLM load such a folder beside the base that it names. PEFT stores both factors transposed:
`lora_A.weight` is [rank, in] and `lora_B.weight` [out, rank].
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from opd_jax.errors import ModelError
from opd_jax.models import hf_names, low_rank
from opd_jax.models.config import ModelConfig
from opd_jax.models.decoder import Params
from opd_jax.models.hf_save import new_folder
from opd_jax.models.json_fields import Json, integer, number, show
from opd_jax.models.low_rank import TARGETS, A, B, LowRank
from opd_jax.models.safetensors_files import Tensor, open_file, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(
    re.escape(_PREFIX) + r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)
_FACTORS = {"A": A, "B": B}
_BASE = "base_sha256"  # in the notes of the safetensors file, which other readers ignore
# Initialisations that leave the base as it is; others change the base, or train from another one.
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")
# Field of adapter_config.json -> what it turns on, where it is neither absent nor empty.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "a quantised base (QALoRA)",
    "loftq_config": "a quantised base (LoftQ)",
    "modules_to_save": "weights that are trained whole",
    "trainable_token_indices": "trained rows of the embedding",
    "rank_pattern": "ranks that differ between matrices",
    "alpha_pattern": "an alpha that differs between matrices",
    "layers_to_transform": "adapters in some of the layers only",
    "layer_replication": "layers that are repeated",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "a bias in the adapters",
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of adapters, before its tensors are read.

    Attributes:
      low_rank: rank, scale and targets. base: hash of the tensors of its base, "" where it is not recorded.
    """

    path: str
    low_rank: LowRank
    base: str


def save(path: str, adapters: Params, low_rank: LowRank, *, source: str, base: str) -> None:
    """Write a new folder of adapters; `source` names the base, `base` is the hash of its tensors.

    Raises ModelError, and leaves nothing behind: the folder is not empty or cannot be written, or a number
    is not finite.
    """
    tensors = {}
    for target in low_rank.targets:
        for letter, factor in _FACTORS.items():
            stacked = np.asarray(adapters["layers"][TARGETS[target]][factor], np.float32)
            if not np.isfinite(stacked).all():
                raise ModelError(
                    f"the adapters of {target} hold NaN or infinity; take an earlier checkpoint"
                )
            for layer, matrix in enumerate(stacked):
                name = _name(target, layer, letter)
                tensors[name] = np.ascontiguousarray(matrix.T)
    with new_folder(path) as folder:
        text = json.dumps(_config(low_rank, source), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", _BASE: base})


def open_folder(path: str, config: ModelConfig) -> Folder:
    """Read and check a folder of adapters of a model; of its tensors names and shapes alone.

    Raises ModelError: a file is missing or broken, what it asks for is not supported, or its adapters are
    not those of such a model.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"folder of adapters {path!r} does not exist; give one with {CONFIG} and {WEIGHTS}"
        )
    source = f"{path}/{CONFIG}"
    fields = read_json(folder / CONFIG)
    _refuse_unsupported(fields, source)
    rank = integer(fields.get("r"), "r", source)
    alpha = number(fields.get("lora_alpha"), "lora_alpha", source)
    power = 0.5 if fields.get("use_rslora") else 1.0
    with open_file(folder / WEIGHTS) as (tensors, notes):
        targets = _targets(f"{path}/{WEIGHTS}", tensors, config)
        found = LowRank(rank, alpha, power, targets)
        _check_shapes(f"{path}/{WEIGHTS}", tensors, found, config)
    return Folder(path, found, notes.get(_BASE, ""))


def load(folder: Folder, config: ModelConfig) -> Params:
    """Return the adapters of a folder, float32 host arrays. Raises ModelError for a number not finite."""
    like = low_rank.abstract_adapters(config, folder.low_rank)
    out: Params = {"layers": {}}
    with open_file(pathlib.Path(folder.path) / WEIGHTS) as (tensors, _):
        for target in folder.low_rank.targets:
            pair = {}
            for letter, factor in _FACTORS.items():
                stacked = np.empty(like["layers"][TARGETS[target]][factor].shape, np.float32)
                for layer, matrix in enumerate(stacked):
                    tensor = tensors[_name(target, layer, letter)]
                    tensor.read_into(matrix.T, (slice(None), slice(None)))
                pair[factor] = stacked
            out["layers"][TARGETS[target]] = pair
    return out


def require_base(folder: Folder, base: str) -> None:
    """Raise ModelError where the folder records another base than that of the hash `base`."""
    if folder.base and folder.base != base:
        raise ModelError(
            f"{folder.path}: its adapters belong to a base with the hash {folder.base[:12]}, and the tensors "
            f"of student.path have {base[:12]}; set --config.student.path to the base that they were trained "
            "on"
        )


def _name(target: str, layer: int, letter: str) -> str:
    """Return PEFT's name of a factor: that of the weight that it adapts, inside a wrapper."""
    (name,) = [
        part.name
        for part in hf_names.parts(f"layers.{TARGETS[target]}.kernel", layer + 1)
        if part.layer == layer
    ]
    return f"{_PREFIX}{name.removesuffix('weight')}lora_{letter}.weight"


def _config(spec: LowRank, source: str) -> Json:
    """Return adapter_config.json. A power besides 1 and 0.5 is written as the alpha of the same scale."""
    rank_stabilised = spec.power == 0.5
    alpha = spec.alpha if rank_stabilised else spec.scale * spec.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": spec.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": rank_stabilised,
        "use_dora": False,
        "target_modules": list(spec.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }


def _refuse_unsupported(fields: Json, source: str) -> None:
    if fields.get("peft_type") != "LORA":
        raise ModelError(
            f"{source}: peft_type is {show(fields.get('peft_type'))}, wanted LORA; "
            "other adapters are not implemented"
        )
    found = [what for field, what in _UNSUPPORTED.items() if fields.get(field)]
    if fields.get("bias", "none") != "none":
        found.append(f"trained biases (bias={show(fields['bias'])})")
    initial = fields.get("init_lora_weights")
    if initial not in _PLAIN:
        found.append(f"init_lora_weights={show(initial)}, which changes the base")
    if found:
        raise ModelError(
            f"{source}: asks for {', '.join(found)}, which is not implemented; "
            "use adapters of plain LoRA on a base that is not quantised"
        )


def _targets(source: str, tensors: dict[str, Tensor], config: ModelConfig) -> tuple[str, ...]:
    """Return the targets that have adapters. Raises ModelError for a tensor of anything else."""
    found = set()
    for name in sorted(tensors):
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in TARGETS or int(match[1]) >= config.num_layers:
            raise ModelError(
                f"{source}: holds {name}, which is no adapter of {', '.join(TARGETS)} in "
                f"{config.num_layers} layers; use adapters of these matrices of this model"
            )
        found.add(match[2])
    if not found:
        raise ModelError(f"{source}: holds no tensors; save the adapters again")
    return tuple(target for target in TARGETS if target in found)


def _check_shapes(
    source: str, tensors: dict[str, Tensor], spec: LowRank, config: ModelConfig
) -> None:
    like: Any = low_rank.abstract_adapters(config, spec)["layers"]
    for target in spec.targets:
        for letter, factor in _FACTORS.items():
            expected = like[TARGETS[target]][factor].shape[:0:-1]
            for layer in range(config.num_layers):
                name = _name(target, layer, letter)
                if name not in tensors:
                    raise ModelError(
                        f"{source}: {name} is missing; every layer needs adapters of the same matrices"
                    )
                actual = tensors[name].shape
                if actual != expected:
                    raise ModelError(
                        f"{source}: {name} has shape {actual}, and r={spec.rank} beside student.path asks "
                        f"for {expected}; use adapters of this model"
                    )
