"""Folders in and out: bit-exact round trips, shards, and what a broken folder says."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import ModelError
from opd_jax.models import hf
from tests.conftest import noisy_params, tiny_config

CONFIG = tiny_config(num_layers=2, tie_embeddings=False)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def params():
    return noisy_params(CONFIG)


@pytest.fixture
def folder(tmp_path, params) -> pathlib.Path:
    hf.save(str(tmp_path / "model"), CONFIG, params)
    return tmp_path / "model"


def shard(folder: pathlib.Path) -> pathlib.Path:
    """Cut the weights into two shards with an index, as large checkpoints come."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def rewrite(folder: pathlib.Path, **changes: np.ndarray | None) -> None:
    """Replace tensors of the weights file by name; None removes one."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def assert_same_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refusal(folder: pathlib.Path) -> str:
    """The one-line message with which `load` refuses the folder."""
    with pytest.raises(ModelError) as error:
        hf.load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load_is_bit_exact(tmp_path, params, dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    hf.save(str(tmp_path), CONFIG, params)
    config, loaded = hf.load(str(tmp_path))
    assert config == CONFIG
    assert_same_trees(loaded, params)


def test_load_converts_to_the_asked_dtype(folder, params):
    _, loaded = hf.load(str(folder), jnp.bfloat16)
    assert_same_trees(loaded, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))


def test_kernels_are_stored_transposed_under_their_hugging_face_names(folder, params):
    tensors = load_file(folder / WEIGHTS)
    kernel_LDF = np.asarray(params["layers"]["gate"]["kernel"])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate_proj.weight"], kernel_LDF[1].T)
    assert tensors["lm_head.weight"].shape == (99, 32)


def test_a_tied_folder_holds_no_head(tmp_path):
    config = tiny_config(num_layers=1)
    hf.save(str(tmp_path), config, noisy_params(config))
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert "head" not in hf.load(str(tmp_path))[1]


def test_shards_load_as_the_single_file_does(folder, params):
    assert_same_trees(hf.load(str(shard(folder)))[1], params)


def test_end_tokens_of_both_config_files_are_merged(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    assert hf.load_config(str(folder)).eos_token_ids == (1, 5)


def test_missing_tensor(folder):
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folder, **{name: None})
    message = refusal(folder)
    assert name in message
    assert str(folder) in message


def test_wrong_shape(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, **{name: np.zeros((48, 31), np.float32)})
    message = refusal(folder)
    assert f"{folder / WEIGHTS}: {name} has shape (31, 48)" in message
    assert "(32, 48)" in message


def test_wrong_dtype(folder):
    rewrite(folder, **{"model.norm.weight": np.ones(32, np.int32)})
    assert f"{folder / WEIGHTS}: model.norm.weight has dtype int32" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, value):
    rewrite(folder, **{"model.norm.weight": np.full(32, value, np.float32)})
    assert f"{folder / WEIGHTS}: model.norm.weight holds NaN or infinity" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_truncated_file(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path}: not a readable safetensors file" in refusal(folder)


def test_missing_shard(folder):
    (shard(folder) / "b.safetensors").unlink()
    message = refusal(folder)
    assert str(folder / INDEX) in message
    assert "'b.safetensors'" in message


def test_tensor_that_its_shard_does_not_hold(folder):
    index = shard(folder) / INDEX
    weight_map = json.loads(index.read_text())["weight_map"] | {"lm_head.weight": "b.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder)
    assert str(folder / "b.safetensors") in message
    assert "lm_head.weight" in message


@pytest.mark.parametrize("path", ["../x", "/x", "sub/x", "..", ""])
def test_shard_paths_cannot_leave_the_folder(folder, path):
    (folder.parent / "x").write_bytes((folder / WEIGHTS).read_bytes())
    shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))
    message = refusal(folder)
    assert str(folder / INDEX) in message
    assert repr(path) in message


@pytest.mark.parametrize("text", ["{", "[]", "", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(folder, text):
    (shard(folder) / INDEX).write_text(text)
    assert str(folder / INDEX) in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_broken_config(folder, content):
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in refusal(folder)


def test_missing_folder_config_or_weights(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "safetensors only" in refusal(folder)
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'} is missing" in refusal(folder)
    assert "'/no/such/folder' does not exist" in refusal(pathlib.Path("/no/such/folder"))
