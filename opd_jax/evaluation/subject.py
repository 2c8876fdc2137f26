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
from opd_jax.errors import ConfigError, ModelError
from opd_jax.models import decoder, kv_cache
from opd_jax.sharding.mesh import Mesh, make_mesh
from opd_jax.training import roles
from opd_jax.workdir.folder import date_of, read_config

_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "*.safetensors")  # fmt: skip
_SLOTS = 256  # sequences decoded at one time, at most


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is known of the model before its weights are read.

    Attributes:
      name: for the table. path: of its folder or workdir. step: of the checkpoint; None for a folder.
      section: its config section (path, dtype, rope_theta, max_position, chat_template).
      config, tokenizer: as opened. vocabulary: ids the tokenizer knows. stop_ids: end tokens.
      mesh: the devices that it will lie on.
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
        """The weights, in the dtype to compute in, whole on every replica."""
        dtype = roles.compute_dtype(self.section.dtype)
        like = decoder.abstract_params(self.config)
        places = self.mesh.weights(like)
        if self.step is None:
            shardings = places if self.mesh.devices else None
            return models.load(self.path, dtype=dtype, shardings=shardings)[1]
        _, host = checkpoint.restore_params(pathlib.Path(self.path), like, step=self.step)
        host = jax.tree.map(lambda w: np.asarray(w).astype(dtype), host)
        return jax.device_put(host, places if self.mesh.devices else None)

    def slots(self, tokens: int) -> int:
        """How many rows of so many tokens to decode at one time: on each replica 256, or fewer where
        memory is short.

        Their caches may take two thirds of what the weights leave of the memory.
        """
        dtype = roles.compute_dtype(self.section.dtype)
        one = _bytes(jax.eval_shape(lambda: kv_cache.init(self.config, 1, tokens, dtype)))
        weights = sum(w.size for w in jax.tree.leaves(decoder.abstract_params(self.config)))
        device = jax.local_devices()[0].memory_stats() or {}
        memory = device.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
            "SC_PHYS_PAGES"
        )
        left = memory - weights * jnp.dtype(dtype).itemsize
        return int(min(max(left * 2 // 3 // one, 1), _SLOTS)) * self.mesh.replicas

    def sha256(self) -> str:
        """Of the files that the model is made of: with it a result says which model it is about."""
        digest = hashlib.sha256()
        source = pathlib.Path(self.section.path)
        kinds = _FILES if self.step is None else _FILES[:-1]  # a checkpoint has other weights
        for file in sorted({f for kind in kinds for f in source.glob(kind)}):
            _add(digest, file, source)
        if self.step is not None:
            folder = pathlib.Path(self.path) / "checkpoints" / str(self.step) / "state"
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                _add(digest, file, folder)
        return digest.hexdigest()


def open_subject(path: str, config: ConfigDict, *, step: int | None) -> Subject:
    """The model at `path`; `config.student` may override its positions, template and dtype.

    Raises an OpdError: a TPU, no such model, no checkpoint of that step, no end token, no such mesh.
    """
    hardware.require_supported(jax.default_backend())
    section, date = ConfigDict(config.student.to_dict() | {"path": path}), config.data.date
    folder = pathlib.Path(path)
    if _is_run(folder):
        trained = read_config(folder)["student"]
        date = date or date_of(folder)
        for field in ("rope_theta", "max_position", "chat_template"):
            section[field] = section[field] or trained.get(field, section[field])
        section.enable_thinking &= trained.get("enable_thinking", True)  # as it was trained
        section.path = trained["path"]
        newest = checkpoint.latest_step(folder)
        step = newest if step is None else step
        if newest is None or step is None:
            raise ModelError(
                f"workdir {path!r} holds no finished checkpoint; wait for the run's first one, or give "
                "a Hugging Face folder"
            )
        whole = folder.resolve()
        kept = f"{whole.parent.name}/" if whole.name == "best" else ""
        name, place = f"{kept}{whole.name}, step {step}", str(whole)
    else:
        if step is not None:
            raise ConfigError(
                f"step={step} is for the workdir of a run, got the model folder {path!r}; leave --step out"
            )
        place = models.locate(path)
        section.path = place = os.path.abspath(place) if os.path.isdir(place) else place
        name = pathlib.PurePath(path).name or path
    model, tokenizer = roles.open_model(section, date)
    vocabulary = min(tokenizer.size, model.vocab_size)
    stop_ids = tuple(i for i in model.eos_token_ids if i < vocabulary)
    if not stop_ids:
        raise ModelError(
            f"{section.path}: no eos_token_id that its tokenizer knows in config.json or "
            "generation_config.json, wanted at least one end token; add it to generation_config.json"
        )
    mesh = make_mesh(config.mesh)
    mesh.check("student", model)
    return Subject(name, place, step, section, model, tokenizer, vocabulary, stop_ids, mesh)


def _is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is the workdir of a run: its config.json has sections, not an architecture."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (folder / "checkpoints").is_dir()
    return isinstance(found, dict) and isinstance(found.get("student"), dict)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _add(digest: Any, file: pathlib.Path, source: pathlib.Path) -> None:
    digest.update(str(file.relative_to(source)).encode() + b"\0")
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)
