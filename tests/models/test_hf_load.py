"""Folders in and out: bit-exact round trips, shards, and what a broken folder says."""

import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import ModelError
from opd_jax.models import decoder, hf_load, safetensors_files, save
from tests.conftest import noisy_params, tiny_config

CONFIG = tiny_config(num_layers=2, tie_embeddings=False)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def params():
    return noisy_params(CONFIG)


@pytest.fixture
def folder(tmp_path, params) -> pathlib.Path:
    save(str(tmp_path / "model"), CONFIG, params)
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
        hf_load.load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load_is_bit_exact(tmp_path, params, dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    save(str(tmp_path), CONFIG, params)
    config, loaded = hf_load.load(str(tmp_path))
    assert config == CONFIG
    assert_same_trees(loaded, params)


def test_load_converts_to_the_asked_dtype(folder, params):
    _, loaded = hf_load.load(str(folder), jnp.bfloat16)
    assert_same_trees(loaded, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))


def test_kernels_are_stored_transposed_under_their_hugging_face_names(folder, params):
    tensors = load_file(folder / WEIGHTS)
    kernel_LDF = np.asarray(params["layers"]["gate"]["kernel"])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate_proj.weight"], kernel_LDF[1].T)
    assert tensors["lm_head.weight"].shape == (99, 32)


def test_a_tied_folder_holds_no_head(tmp_path):
    config = tiny_config(num_layers=1)
    save(str(tmp_path), config, noisy_params(config))
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert "head" not in hf_load.load(str(tmp_path))[1]


def test_an_equal_head_beside_tied_embeddings_and_buffers_are_not_read(tmp_path):
    """Old checkpoints hold `rotary_emb.inv_freq`, and some tied ones their head once more."""
    config = tiny_config(num_layers=2)
    params = noisy_params(config)
    folder = tmp_path / "model"
    save(str(folder), config, params)
    extra = {
        "lm_head.weight": np.asarray(params["embed"]["embedding"]),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64),
        "model.layers.1.self_attn.masked_bias": np.ones((), np.int64),
    }
    rewrite(folder, **extra)
    assert_same_trees(hf_load.load(str(folder))[1], params)
    assert_same_trees(hf_load.load(str(shard(folder)))[1], params)


def test_layers_of_different_dtypes_become_float32(folder, params):
    name = "model.layers.1.mlp.up_proj.weight"
    half = load_file(folder / WEIGHTS)[name].astype(np.float16)
    rewrite(folder, **{name: half})
    up = hf_load.load(str(folder))[1]["layers"]["up"]["kernel"]
    assert up.dtype == jnp.float32
    np.testing.assert_array_equal(up[1], half.T)
    np.testing.assert_array_equal(up[0], params["layers"]["up"]["kernel"][0])


def test_overrides_reach_the_config(folder):
    config, _ = hf_load.load(str(folder), rope_theta=4e4, max_position=64)
    assert config == tiny_config(
        num_layers=2, tie_embeddings=False, rope_theta=4e4, max_position=64
    )
    assert config == hf_load.load_config(str(folder), rope_theta=4e4, max_position=64)
    with pytest.raises(ModelError, match="rope_theta is overridden by -1"):
        hf_load.load(str(folder), rope_theta=-1)


@pytest.mark.parametrize("chunk", [1, 100, 3000])
def test_chunks_do_not_matter(folder, params, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_files, "CHUNK", chunk)
    assert_same_trees(hf_load.load(str(folder))[1], params)


def test_each_file_is_opened_once(folder, monkeypatch):
    shard(folder)
    opened = []
    real = safetensors_files.safe_open
    monkeypatch.setattr(
        safetensors_files, "safe_open", lambda path, **k: opened.append(path) or real(path, **k)
    )
    hf_load.load(str(folder))
    assert sorted(path.name for path in opened) == ["a.safetensors", "b.safetensors"]


def test_host_memory_is_the_result_and_a_buffer(tmp_path, monkeypatch):
    """NumPy tells tracemalloc of its arrays, which JAX takes over on CPU, without a copy."""
    config = tiny_config(num_layers=8, hidden_size=128, intermediate_size=512, vocab_size=4096)
    params = noisy_params(config)
    save(str(tmp_path / "model"), config, params)
    monkeypatch.setattr(safetensors_files, "CHUNK", 1 << 16)
    shapes = decoder.abstract_params(config)
    monkeypatch.setattr(decoder, "abstract_params", lambda _: shapes)  # tracing has its own memory
    hf_load.load(str(tmp_path / "model"))  # whatever is imported only once
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    hf_load.load(str(tmp_path / "model"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < total + 0.2 * largest


def test_shards_load_as_the_single_file_does(folder, params):
    assert_same_trees(hf_load.load(str(shard(folder)))[1], params)


def test_end_tokens_of_both_config_files_are_merged(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    assert hf_load.load_config(str(folder)).eos_token_ids == (1, 5)


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
    assert f"{folder / WEIGHTS}: model.norm.weight has dtype I32" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, value):
    rewrite(folder, **{"model.norm.weight": np.full(32, value, np.float32)})
    assert f"{folder / WEIGHTS}: model.norm.weight holds NaN or infinity" in refusal(folder)


def test_all_is_checked_before_anything_is_read(folder, monkeypatch):
    rewrite(folder, **{"model.norm.weight": np.ones(31, np.float32)})
    monkeypatch.setattr(hf_load, "_place", lambda *_: pytest.fail("a tensor was read"))
    assert "model.norm.weight has shape (31,)" in refusal(folder)


def header_of(path: pathlib.Path) -> tuple[dict, bytes]:
    """The header of a safetensors file and the bytes after it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def lie(header: dict, how: str) -> dict:
    """A header that does not describe its file."""
    entry = header["model.norm.weight"]
    begin, end = entry["data_offsets"]
    changed = {
        "beyond the end": {"data_offsets": [begin, end + 10**9]},
        "negative": {"data_offsets": [-8, end]},
        "overlapping": {"data_offsets": [0, end - begin]},
        "another shape": {"shape": [10**6]},
        "gigantic shape": {"shape": [2**62, 2**62]},
        "another dtype": {"dtype": "F64"},
        "unknown dtype": {"dtype": "F31"},
        "text for numbers": {"shape": ["32"]},
        "no offsets": {"data_offsets": None},
    }[how]
    return header | {"model.norm.weight": entry | changed}


@pytest.mark.parametrize(
    "how",
    ["beyond the end", "negative", "overlapping", "another shape", "gigantic shape",
     "another dtype", "unknown dtype", "text for numbers", "no offsets"],
)  # fmt: skip
def test_headers_that_lie(folder, how):
    path = folder / WEIGHTS
    header, data = header_of(path)
    text = json.dumps(lie(header, how)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert f"{path}: not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize("size", [0, 2**40, 2**64 - 1])
def test_headers_of_impossible_length(folder, size):
    path = folder / WEIGHTS
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    assert f"{path}: not a readable safetensors file" in refusal(folder)


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    path = folder / WEIGHTS
    real = hf_load._match_leaf

    def shrink(*args):
        path.write_bytes(path.read_bytes()[:3000])
        return real(*args)

    monkeypatch.setattr(hf_load, "_match_leaf", shrink)
    message = refusal(folder)
    assert f"{path}: ends within " in message


def test_quantised_weights(folder):
    rewrite(folder, **{"model.layers.0.mlp.up_proj.weight": np.ones((48, 32), np.int8)})
    message = refusal(folder)
    assert "model.layers.0.mlp.up_proj.weight has dtype I8" in message
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    assert f"{folder / 'config.json'}: the weights are quantised" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**8}, {"hidden_size": 10**8}, {"vocab_size": 10**8},
        {"intermediate_size": 10**8, "hidden_size": 10**8, "vocab_size": 10**8,
         "num_hidden_layers": 10**8, "head_dim": 10**8, "num_attention_heads": 10**8,
         "num_key_value_heads": 10**8},
    ],
)  # fmt: skip
def test_gigantic_sizes_cost_nothing(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [99, [1, 99], 10**30, -1, "1", True, {"a": 1}])
def test_end_tokens_that_the_vocabulary_does_not_hold(folder, name, value):
    file = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(file | {"eos_token_id": value}))
    message = refusal(folder)
    assert f"{folder / name}: eos_token_id is" in message


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


@pytest.mark.parametrize("path", ["../x", "/x", "sub/x", "..", "", "a\0b", 3, None, ["a"]])
def test_shard_paths_cannot_leave_the_folder(folder, path):
    (folder.parent / "x").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_bytes((folder / WEIGHTS).read_bytes())
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
