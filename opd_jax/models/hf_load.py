"""Load Hugging Face folders: config.json + safetensors (one file, or shards and an index).

Only JSON and safetensors are read: no pickle, no code from the folder.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax.errors import ModelError
from opd_jax.models import config as architecture
from opd_jax.models import decoder, hf_inventory, hf_names
from opd_jax.models.config import ModelConfig
from opd_jax.models.hf_names import EMBEDDING, HEAD
from opd_jax.models.safetensors_files import Tensor, holds_weights, open_tensors, read_json

Index = tuple[slice, ...]


def load_config(path: str, *, rope_theta: float = 0.0, max_position: int = 0) -> ModelConfig:
    """Read and check `config.json` and the end tokens of `generation_config.json`.

    The only weights read are those of a head where config.json ties the embeddings and the folder has a head
    all the same: if its numbers differ from the embedding's, the model is untied (as in transformers).

    `rope_theta` and `max_position` replace the file's values; 0 keeps them. LUFFY's 16k student,
    for one, is Qwen2.5-Math-7B with 40000 and 16384.

    Raises ModelError: folder or file missing, broken JSON, unsupported architecture.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"model folder {path!r} does not exist; "
            "give the path of a folder with config.json, model.safetensors and tokenizer.json"
        )
    config = architecture.from_hf(
        read_json(folder / "config.json"),
        source=f"{path}/config.json",
        rope_theta=rope_theta,
        max_position=max_position,
    )
    generation = folder / "generation_config.json"
    if generation.is_file():
        value = read_json(generation).get("eos_token_id")
        ids = architecture.eos_ids(value, config.vocab_size, source=str(generation))
        merged = tuple(dict.fromkeys(config.eos_token_ids + ids))
        config = dataclasses.replace(config, eos_token_ids=merged)
    if config.tie_embeddings and _has_own_head(folder):
        config = dataclasses.replace(config, tie_embeddings=False)
    return config


def check_weights(path: str, config: ModelConfig) -> list[str]:
    """Check names, shapes and dtypes of a folder's tensors; return lines for the start of a run.

    The lines name the tensors that are not read, and a head that config.json wrongly calls tied. A folder
    without weights gives none. Raises ModelError in the cases in which `load` does before it reads.
    """
    if not holds_weights(pathlib.Path(path)):
        return []
    lines = []
    if not config.tie_embeddings and read_json(pathlib.Path(path) / "config.json").get(
        "tie_word_embeddings"
    ):
        lines.append(
            f"config.json sets tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: not tied"
        )
    with open_tensors(pathlib.Path(path)) as tensors:
        return lines + _match(path, config, tensors, decoder.abstract_params(config))[1]


def load(
    path: str,
    dtype: Any = None,
    *,
    shardings: Any = None,
    rope_theta: float = 0.0,
    max_position: int = 0,
) -> tuple[ModelConfig, decoder.Params]:
    """Read a folder -> (config, params).

    Args:
      path: a folder with config.json and safetensors.
      dtype: the dtype to convert to while loading; None keeps the file's.
      shardings: a tree of `jax.sharding.Sharding` like the params: only the slices of each leaf
        that this process's devices hold are read, one at a time; None: the default device.
      rope_theta, max_position: see `load_config`.

    Host memory besides the result stays within a buffer of safetensors_files.CHUNK bytes and, where the
    devices have memory of their own, the largest shard of a leaf.

    Raises ModelError naming file and tensor: missing, truncated, wrong shape or dtype, not finite.
    Names, shapes and dtypes of all tensors are checked before the first is read.
    """
    config = load_config(path, rope_theta=rope_theta, max_position=max_position)
    abstract = decoder.abstract_params(config)
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, abstract)
    with open_tensors(pathlib.Path(path)) as tensors:
        tensors_of, _ = _match(path, config, tensors, abstract)
        dtypes = jax.tree.map(
            lambda parts: parts.dtype if dtype is None else np.dtype(dtype), tensors_of
        )
        host = _Host(max(jax.tree.leaves(jax.tree.map(_shard_bytes, abstract, dtypes, shardings))))
        params = jax.tree.map(
            lambda leaf, parts, dtype, sharding: _place(leaf.shape, parts, dtype, sharding, host),
            abstract,
            tensors_of,
            dtypes,
            shardings,
        )
    return config, params


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The tensors of one leaf, in the order of its layers; not a pytree, so that it is a leaf itself."""

    tensors: tuple[Tensor, ...]
    stacked: bool
    transposed: bool

    @property
    def dtype(self) -> np.dtype:
        """The dtype they share; float32 where layers differ."""
        kinds = {tensor.dtype for tensor in self.tensors}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def _has_own_head(folder: pathlib.Path) -> bool:
    """Return `has_own_head`, and False for a missing or broken file, which loading the weights refuses."""
    try:
        with open_tensors(folder) as tensors:
            return hf_inventory.has_own_head(tensors)
    except ModelError:
        return False


def _match(
    path: str, config: ModelConfig, tensors: dict[str, Tensor], abstract: decoder.Params
) -> tuple[Any, list[str]]:
    """Replace each leaf of `abstract` by its tensors, checked; return lines about tensors without a leaf."""
    by_name = tensors
    if config.tie_embeddings and EMBEDDING not in tensors and HEAD in tensors:
        by_name = tensors | {EMBEDDING: tensors[HEAD]}  # one matrix, stored under its other name
    tensors_of = jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: _match_leaf(path, by_name, hf_names.leaf_name(key_path), leaf.shape),
        abstract,
    )
    names = {tensor.name for parts in jax.tree.leaves(tensors_of) for tensor in parts.tensors}
    return tensors_of, hf_inventory.unread(path, config, tensors, names)


def _match_leaf(path: str, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> _Parts:
    """Return the tensors that make up a leaf, checked against the shape that config.json requires."""
    tensors_of = []
    transposed, stacked = False, False
    for part in hf_names.parts(name, shape[0]):
        tensor = tensors.get(part.name)
        if tensor is None:
            raise hf_inventory.missing(path, part.name, tensors)
        transposed, stacked = part.transposed, part.layer is not None
        actual = tensor.shape[::-1] if transposed else tensor.shape
        expected = shape[1:] if stacked else shape
        if actual != expected:
            raise ModelError(
                f"{tensor.path}: {part.name} has shape {actual} here, config.json "
                f"asks for {expected} (kernels are shown [in, out]); the folder mixes two models: "
                "download it again"
            )
        _ = tensor.dtype  # raises if it is not a float
        tensors_of.append(tensor)
    return _Parts(tuple(tensors_of), stacked, transposed)


class _Host:
    """Host memory that a shard is read into on its way to its devices.

    On a CPU each shard gets a new aligned buffer, which JAX uses as the array, without a copy. Elsewhere one
    buffer serves all shards, because JAX frees new ones later than it has copied them. (One buffer is never
    safe on a CPU: an array may be an alias of it, even with `may_alias=False`.)
    """

    def __init__(self, largest: int):
        self._largest, self._shared = largest, np.empty(0, np.uint8)

    def buffer(self, size: int, platform: str) -> np.ndarray:
        """Return `size` bytes; except on CPU this overwrites the buffer of the call before."""
        if platform == "cpu":
            fresh = np.empty(size + 63, np.uint8)
            return fresh[-fresh.ctypes.data % 64 :][:size]
        if not len(self._shared):
            self._shared = np.empty(self._largest, np.uint8)
        return self._shared[:size]


def _shard_bytes(
    leaf: jax.ShapeDtypeStruct, dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> int:
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * dtype.itemsize


def _place(
    shape: tuple[int, ...],
    parts: _Parts,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    host: _Host,
) -> jax.Array:
    """Place one leaf on its devices; each distinct shard of it is read once."""

    def put(index: Index, devices: Sequence[jax.Device | None], platform: str) -> list[jax.Array]:
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        buffer = host.buffer(math.prod(sizes) * dtype.itemsize, platform)
        shard = buffer.view(dtype).reshape(sizes)
        _read_into(shard, parts, index)
        copies = [jax.device_put(shard, device) for device in devices]
        return jax.block_until_ready(copies)  # the next shard overwrites the buffer

    if sharding is None:  # uncommitted, on the default device (not jnp.asarray: it copies twice)
        return put(tuple(slice(None) for _ in shape), [None], _default_platform())[0]
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        shards += put(tuple(slice(*bound) for bound in bounds), devices, devices[0].platform)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _default_platform() -> str:
    """Return the platform of a new array: jax.default_device may differ from jax.default_backend."""
    return next(iter(jax.device_put(np.zeros(())).devices())).platform


def _read_into(out: np.ndarray, parts: _Parts, index: Index) -> None:
    """Fill `out` with the slice `index` of a leaf: layers stacked, kernels transposed."""
    if not parts.stacked:
        parts.tensors[0].read_into(out, index)
        return
    for target, tensor in zip(out, parts.tensors[index[0]], strict=True):
        if parts.transposed:
            tensor.read_into(target.T, index[:0:-1])
        else:
            tensor.read_into(target, index[1:])
