"""Hugging Face folders in and out: config.json + safetensors (one file, or shards and an index).

Nothing but JSON and safetensors is read: no pickle, no code from the folder.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opd_jax.errors import ModelError
from opd_jax.models import architecture, decoder
from opd_jax.models.architecture import ModelConfig

# Our name within a layer -> (name in the file, transposed). Dense kernels are [in, out] here.
_LAYER = {
    "attention_norm.scale": ("input_layernorm.weight", False),
    "query.kernel": ("self_attn.q_proj.weight", True),
    "query.bias": ("self_attn.q_proj.bias", False),
    "key.kernel": ("self_attn.k_proj.weight", True),
    "key.bias": ("self_attn.k_proj.bias", False),
    "value.kernel": ("self_attn.v_proj.weight", True),
    "value.bias": ("self_attn.v_proj.bias", False),
    "query_norm.scale": ("self_attn.q_norm.weight", False),
    "key_norm.scale": ("self_attn.k_norm.weight", False),
    "output.kernel": ("self_attn.o_proj.weight", True),
    "mlp_norm.scale": ("post_attention_layernorm.weight", False),
    "gate.kernel": ("mlp.gate_proj.weight", True),
    "up.kernel": ("mlp.up_proj.weight", True),
    "down.kernel": ("mlp.down_proj.weight", True),
}
_TOP = {
    "embed.embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = ("float32", "bfloat16", "float16")


def load_config(path: str) -> ModelConfig:
    """Read and check `config.json` (and the end tokens of `generation_config.json`), no weights.

    Raises ModelError: folder or file missing, broken JSON, unsupported architecture.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"model folder {path!r} does not exist; "
            "give the path of a folder with config.json, model.safetensors and tokenizer.json"
        )
    config = architecture.from_hf(_json(folder / "config.json"), source=f"{path}/config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids = architecture.eos_ids(_json(generation).get("eos_token_id"), source=str(generation))
        merged = tuple(dict.fromkeys(config.eos_token_ids + ids))
        config = dataclasses.replace(config, eos_token_ids=merged)
    return config


def load(path: str, dtype: Any = None) -> tuple[ModelConfig, decoder.Params]:
    """Read a folder -> (config, params); `dtype` converts on the way, None keeps the file's.

    Raises ModelError naming file and tensor: missing, truncated, wrong shape or dtype, not finite.
    """
    config = load_config(path)
    folder = pathlib.Path(path)
    files = _files(folder)
    wanted = jax.tree_util.tree_leaves_with_path(decoder.abstract_params(config))
    params: decoder.Params = {}
    for key_path, leaf in wanted:
        name = ".".join(str(k.key) for k in key_path)
        target = params
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = jnp.asarray(_read(folder, files, name, leaf.shape, dtype))
    return config, params


def save(path: str, config: ModelConfig, params: decoder.Params, tokenizer: Any = None) -> None:
    """Write the folder `load` and transformers read: config, generation config, weights, tokenizer.

    `tokenizer`: anything with `save_pretrained`. Overwrites files of the same names.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(str(k.key) for k in key_path)
        array = np.asarray(leaf)
        for file_name, index, transposed in _tensors(name, array.shape[0]):
            piece = array if index is None else array[index]
            tensors[file_name] = np.ascontiguousarray(piece.T if transposed else piece)
    save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype)
    _write_json(folder / "config.json", architecture.to_hf(config) | {"dtype": dtype})
    if config.eos_token_ids:
        ids = list(config.eos_token_ids)
        _write_json(folder / "generation_config.json", {"eos_token_id": ids})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tensors(name: str, layers: int) -> Iterator[tuple[str, int | None, bool]]:
    """The file's tensors that make up our leaf `name`: (file name, layer, transposed)."""
    if name.startswith("layers."):
        file_name, transposed = _LAYER[name.removeprefix("layers.")]
        for i in range(layers):
            yield f"model.layers.{i}.{file_name}", i, transposed
    else:
        yield _TOP[name], None, False


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Which file holds each tensor."""
    if (folder / _INDEX).is_file():
        weight_map = _json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / _INDEX}: no weight_map; download the folder again")
        for shard in sorted(set(map(str, weight_map.values()))):
            if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
                raise ModelError(f"{folder / _INDEX}: shard {shard!r} is not in the folder; add it")
        return {name: folder / shard for name, shard in weight_map.items()}
    single = folder / _SINGLE
    if not single.is_file():
        raise ModelError(
            f"{folder}: neither {_SINGLE} nor {_INDEX} is there; "
            "opd_jax reads safetensors only (no pickle .bin files): convert the weights"
        )
    with _open(single) as file:
        return {name: single for name in file.keys()}  # noqa: SIM118 (safe_open has no __iter__)


def _read(
    folder: pathlib.Path, files: dict[str, pathlib.Path], name: str, shape: tuple, dtype: Any
) -> np.ndarray:
    """One leaf of the parameter tree, layers stacked, checked against the shape config.json gives."""
    leaf: np.ndarray | None = None
    for file_name, index, transposed in _tensors(name, shape[0]):
        if file_name not in files:
            raise ModelError(
                f"{folder}: tensor {file_name} is missing, config.json asks for it; "
                "download the folder again"
            )
        with _open(files[file_name]) as file:
            try:
                tensor = file.get_tensor(file_name)
            except (SafetensorError, ValueError, TypeError, AttributeError) as error:
                raise ModelError(f"{files[file_name]}: cannot read {file_name}: {error}") from error
        tensor = tensor.T if transposed else tensor
        want = shape if index is None else shape[1:]
        if tensor.shape != want:
            raise ModelError(
                f"{files[file_name]}: {file_name} has shape {tensor.shape} here, config.json "
                f"asks for {want} (kernels are shown [in, out]); the folder mixes two models"
            )
        if str(tensor.dtype) not in _FLOATS:
            raise ModelError(
                f"{files[file_name]}: {file_name} has dtype {tensor.dtype}, "
                f"wanted one of {', '.join(_FLOATS)}"
            )
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ModelError(
                f"{files[file_name]}: {file_name} holds NaN or infinity; use another checkpoint"
            )
        if leaf is None:
            leaf = np.empty(shape, np.dtype(dtype) if dtype is not None else tensor.dtype)
        leaf[... if index is None else index] = tensor
    assert leaf is not None  # every leaf has at least one layer: from_hf checks it
    return leaf


def _open(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file ({error}); download it again"
        ) from error


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; download the folder again") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, wanted an object")
    return value


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
