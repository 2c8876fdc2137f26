"""Save Hugging Face folders: config.json, generation_config.json, safetensors, tokenizer files.

Writing is atomic: a folder is written under another name next to its place, and then renamed.
"""

import contextlib
import json
import math
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from opd_jax.errors import ModelError
from opd_jax.models import config as architecture
from opd_jax.models import decoder, hf_names
from opd_jax.models.config import ModelConfig
from opd_jax.models.json_fields import Json
from opd_jax.models.safetensors_files import INDEX, SINGLE, read_json

# Fields of a source's config.json that `to_hf` and the dtype replace, under any of their names.
_REPLACED = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
              "original_max_position_embeddings", "dtype", "torch_dtype")  # fmt: skip
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
              "chat_template.jinja", "chat_template.json")  # fmt: skip


def save(
    path: str,
    config: ModelConfig,
    params: decoder.Params,
    tokenizer: Any = None,
    *,
    source: str | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load` and transformers read.

    Args:
      path: a new or empty folder; its parents are created.
      config, params: the model. Leaves may be JAX or NumPy arrays.
      tokenizer: any object with `save_pretrained`.
      source: a model folder; its tokenizer files, generation settings and the fields of config.json
        that are not modelled here (bos_token_id, ...) are copied.
      dtype: the dtype to convert to; None keeps the parameters'.
      max_shard_bytes: larger weights are split into files of at most this size, with an index.

    Host memory besides the parameters stays within about one such file.

    Raises ModelError, and leaves nothing behind: the folder is not empty or cannot be written, the params
    do not match the config, a number is not finite in `dtype`.
    """
    check_free(path)
    _check_params(config, params)
    with new_folder(path) as temporary:
        stored = np.dtype(dtype) if dtype is not None else params["embed"]["embedding"].dtype
        _write_configs(temporary, config, str(stored), source)
        _write_weights(temporary, params, dtype, max_shard_bytes)
        if source is not None:
            for name in _TOKENIZER:
                if (pathlib.Path(source) / name).is_file():
                    shutil.copyfile(pathlib.Path(source) / name, temporary / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[pathlib.Path]:
    """Make a folder under another name; at the end of the `with` it is renamed to `path`, complete.

    Raises ModelError, and leaves nothing behind, where it cannot be written or `path` is in use.
    """
    check_free(path)
    folder = pathlib.Path(path).resolve()
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise ModelError(
            f"model folder {path!r} cannot be written ({error.strerror or error}); "
            "give another path, or make room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success it does not exist any more


def check_free(path: str) -> None:
    """Raise ModelError where the path is in use, so that no model is ever overwritten."""
    folder = pathlib.Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise ModelError(
            f"model folder {path!r} is not empty; give a new folder, or remove this one first"
        )
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"model folder {path!r} is a file; give a new folder")


def _check_params(config: ModelConfig, params: decoder.Params) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {
            hf_names.leaf_name(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    actual, expected = shapes(params), shapes(decoder.abstract_params(config))
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise ModelError(
                f"parameter {name} has shape {actual.get(name)}, its config asks for "
                f"{expected.get(name)}; save it with the config that it was created with"
            )


def _write_configs(
    folder: pathlib.Path, config: ModelConfig, dtype: str, source: str | None
) -> None:
    original: Json = read_json(pathlib.Path(source) / "config.json") if source is not None else {}
    fields = architecture.to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    if "eos_token_id" in original:  # `config` also has the end tokens of generation_config.json
        fields["eos_token_id"] = original["eos_token_id"]
    kept = {name: value for name, value in original.items() if name not in _REPLACED}
    _write_json(folder / "config.json", kept | fields)
    names = ("bos_token_id", "pad_token_id")
    generation: Json = {name: original[name] for name in names if original.get(name) is not None}
    if source is not None and (pathlib.Path(source) / "generation_config.json").is_file():
        generation |= read_json(pathlib.Path(source) / "generation_config.json")
    if config.eos_token_ids:
        generation["eos_token_id"] = list(config.eos_token_ids)
    if generation:
        _write_json(folder / "generation_config.json", generation)


def _write_weights(
    folder: pathlib.Path, params: decoder.Params, dtype: Any, max_shard_bytes: int
) -> None:
    """Write one file, or several within the limit and their index; hold one file's tensors at a time."""
    shards: list[list[tuple[hf_names.Part, Any]]] = [[]]
    total = filled = 0
    for part, leaf in _in_file_order(params):
        count = leaf.size if part.layer is None else leaf.size // len(leaf)
        size = count * np.dtype(dtype if dtype is not None else leaf.dtype).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((part, leaf))
        filled += size
        total += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        tensors = {part.name: _tensor(part, leaf, dtype) for part, leaf in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors makes it private
        weight_map |= dict.fromkeys(tensors, name)
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def _in_file_order(params: decoder.Params) -> Iterator[tuple[hf_names.Part, Any]]:
    """Yield every tensor with its leaf: the embedding, layer after layer, the last norm, the head."""
    placed = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = hf_names.leaf_name(path)
        for part in hf_names.parts(name, len(leaf)):
            outside = -math.inf if name.startswith("embed") else math.inf
            placed.append((outside if part.layer is None else part.layer, part, leaf))
    for _, part, leaf in sorted(placed, key=lambda entry: entry[0]):
        yield part, leaf


def _tensor(part: hf_names.Part, leaf: Any, dtype: Any) -> np.ndarray:
    piece = np.asarray(leaf if part.layer is None else leaf[part.layer])
    with np.errstate(over="ignore"):
        tensor = np.ascontiguousarray(piece.T if part.transposed else piece, dtype)
    if not np.isfinite(tensor).all():
        what = "NaN or infinity" if not np.isfinite(piece).all() else f"more than {dtype} holds"
        raise ModelError(
            f"parameter {part.name} holds {what}; "
            "take an earlier checkpoint, or save as float32 or bfloat16"
        )
    return tensor


def _write_json(path: pathlib.Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
