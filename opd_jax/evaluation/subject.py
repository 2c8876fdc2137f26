"""The model to evaluate: a Hugging Face folder, a hub name, or the checkpoint of a workdir."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opd_jax import checkpoint, data, hardware, models
from opd_jax.checkpoint.student import restore_student
from opd_jax.errors import ConfigError, ModelError
from opd_jax.models import attention, decoder, kv_cache
from opd_jax.sharding.mesh import Mesh, make_mesh
from opd_jax.training import roles
from opd_jax.workdir.folder import date_of, read_config

_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "*.safetensors")  # fmt: skip
_SLOTS = 256  # most sequences decoded concurrently


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model to evaluate, before its weights are read.

    Attributes:
      name: name in the table. path: its model folder or workdir.
      step: step of the checkpoint; None for a model folder.
      section: its config section (path, dtype, rope_theta, max_position, chat_template).
      config, tokenizer: architecture and tokenizer.
      vocabulary: number of ids that both tokenizer and model have. stop_ids: end tokens.
      mesh: devices for its weights.
    """

    name: str
    path: str
    step: int | None
    section: Any
    config: models.ModelConfig
    tokenizer: data.Tokenizer
    vocabulary: int
    stop_ids: tuple[int, ...]
    mesh: Mesh

    def load(self) -> models.Params:
        """Load the weights in the compute dtype, with a complete copy on every replica."""
        dtype = roles.compute_dtype(self.section.dtype)
        like = decoder.abstract_params(self.config)
        shardings = self.mesh.weights(like) if self.mesh.devices else None
        if self.step is None:
            return models.load(self.path, dtype=dtype, shardings=shardings)[1]
        _, host = restore_student(pathlib.Path(self.path), self.config, step=self.step)
        host = jax.tree.map(lambda w: np.asarray(w).astype(dtype), host)
        return jax.device_put(host, shardings)

    def slots(self, tokens: int) -> int:
        """Return the number of rows of `tokens` tokens to decode concurrently, on all replicas together.

        This is 256 per replica, or fewer if memory is short: the caches may take two thirds of the memory
        that the weights leave free.
        """
        dtype = roles.compute_dtype(self.section.dtype)
        row = _bytes(jax.eval_shape(lambda: kv_cache.init(self.config, 1, tokens, dtype)))
        weights = sum(w.size for w in jax.tree.leaves(decoder.abstract_params(self.config)))
        device = jax.local_devices()[0].memory_stats() or {}
        memory = device.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
            "SC_PHYS_PAGES"
        )
        left = memory - weights * jnp.dtype(dtype).itemsize
        return int(min(max(left * 2 // 3 // row, 1), _SLOTS)) * self.mesh.replicas

    def sha256(self) -> str:
        """Hash the files of the model, so that a result identifies its model."""
        digest = hashlib.sha256()
        source = pathlib.Path(self.section.path)
        patterns = _FILES if self.step is None else _FILES[:-1]  # a checkpoint replaces the weights
        for file in sorted({f for pattern in patterns for f in source.glob(pattern)}):
            _add(digest, file, source)
        if self.step is not None:
            folder = pathlib.Path(self.path) / "checkpoints" / str(self.step) / "state"
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                _add(digest, file, folder)
        return digest.hexdigest()


def open_subject(path: str, config: ConfigDict, *, step: int | None) -> Subject:
    """Open the model at `path`; `config.student` may override its positions, template and dtype.

    Raises an OpdError on a TPU, or if the model, the checkpoint of that step, an end token or the devices
    of the mesh are missing.
    """
    hardware.require_supported(jax.default_backend())
    roles.ask_for_full_products([config.student.dtype])
    section, date = ConfigDict(config.student.to_dict() | {"path": path}), config.data.date
    folder = pathlib.Path(path)
    if _is_run(folder):
        trained = read_config(folder)["student"]
        date = date or date_of(folder)
        for field in ("rope_theta", "max_position", "chat_template"):
            section[field] = section[field] or trained.get(field, section[field])
        section.enable_thinking &= trained.get("enable_thinking", True)  # as in training
        section.path = trained["path"]
        newest = checkpoint.latest_step(folder)
        step = newest if step is None else step
        if newest is None or step is None:
            raise ModelError(
                f"workdir {path!r} holds no finished checkpoint; wait for the run's first one, or set "
                "--model to a Hugging Face folder"
            )
        resolved = folder.resolve()
        parent = f"{resolved.parent.name}/" if resolved.name == "best" else ""
        name, location = f"{parent}{resolved.name}, step {step}", str(resolved)
    else:
        if step is not None:
            raise ConfigError(
                f"step={step} is for the workdir of a run, but {path!r} is a model folder; leave --step out"
            )
        location = models.locate(path)
        if os.path.isdir(location):
            location = os.path.abspath(location)
        section.path = location
        name = pathlib.PurePath(path).name or path
    model, tokenizer = roles.open_model(section, date)
    vocabulary = min(tokenizer.size, model.vocab_size)
    stop_ids = tuple(i for i in model.eos_token_ids if i < vocabulary)
    if not stop_ids:
        raise ModelError(
            f"{section.path}: neither config.json nor generation_config.json has an eos_token_id that the "
            "tokenizer knows; add at least one to generation_config.json"
        )
    mesh = make_mesh(config.mesh)
    attention.choose(config.mesh.attention)
    mesh.check("student", model)
    return Subject(name, location, step, section, model, tokenizer, vocabulary, stop_ids, mesh)


def _is_run(folder: pathlib.Path) -> bool:
    """Return whether a folder is the workdir of a run: its config.json has sections, not an architecture."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (folder / "checkpoints").is_dir()
    return isinstance(content, dict) and isinstance(content.get("student"), dict)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _add(digest: Any, file: pathlib.Path, source: pathlib.Path) -> None:
    digest.update(str(file.relative_to(source)).encode() + b"\0")
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)
