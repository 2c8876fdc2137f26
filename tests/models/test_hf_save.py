"""Folders out: shards, dtypes, what a source carries over, and that a refused save leaves nothing."""

import json
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import ModelError
from opd_jax.models import hf_save, load, load_config, save
from tests.conftest import noisy_params, tiny_config
from tests.models.test_hf_load import assert_same_trees

CONFIG = tiny_config(num_layers=2, tie_embeddings=False)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def params():
    return noisy_params(CONFIG)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("limit", [5_000_000_000, 9_000, 1])
def test_load_save_load_is_bit_exact(tmp_path, params, dtype, limit):
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    save(str(tmp_path / "one"), CONFIG, params)
    save(str(tmp_path / "two"), *load(str(tmp_path / "one")), max_shard_bytes=limit)
    config, loaded = load(str(tmp_path / "two"))
    assert config == CONFIG
    assert_same_trees(loaded, params)
    stored = json.loads((tmp_path / "two" / "config.json").read_text())
    assert stored["dtype"] == stored["torch_dtype"] == jnp.dtype(dtype).name


def test_shards_keep_the_limit_and_have_an_index(tmp_path, params):
    save(str(tmp_path / "one"), CONFIG, params)
    save(str(tmp_path / "cut"), CONFIG, params, max_shard_bytes=20_000)
    shards = [name for name in names(tmp_path / "cut") if name.endswith(".safetensors")]
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, 7)]
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    whole, seen = load_file(tmp_path / "one" / WEIGHTS), {}
    for shard in shards:
        tensors = load_file(tmp_path / "cut" / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == shard for name in tensors)
        seen |= tensors
    assert index["weight_map"].keys() == seen.keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, tensor in whole.items():
        np.testing.assert_array_equal(seen[name], tensor)


def test_one_file_at_a_time_is_in_memory(tmp_path, params, monkeypatch):
    alive, peak = [], []

    def save_and_count(tensors, *rest, **named):
        peak.append(sum(ref() is not None for ref in alive) + len(tensors))
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_file(tensors, *rest, **named)

    monkeypatch.setattr(hf_save, "save_file", save_and_count)
    save(str(tmp_path / "cut"), CONFIG, params, dtype=jnp.bfloat16, max_shard_bytes=9_000)
    assert len(peak) > 4
    assert sum(peak) == len(alive)  # none of an earlier file was alive


def test_the_dtype_asked_for(tmp_path, params):
    save(str(tmp_path / "half"), CONFIG, params, dtype="bfloat16")
    assert_same_trees(
        load(str(tmp_path / "half"))[1], jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    )


def test_a_tied_model_keeps_shards_and_has_no_head(tmp_path):
    config = tiny_config(num_layers=2)
    params = noisy_params(config)
    save(str(tmp_path / "cut"), config, params, max_shard_bytes=9_000)
    assert "lm_head.weight" not in json.loads((tmp_path / "cut" / INDEX).read_text())["weight_map"]
    assert_same_trees(load(str(tmp_path / "cut"))[1], params)


@pytest.fixture
def source(tmp_path, params) -> pathlib.Path:
    """A folder as the hub has them: fields and files that we do not model."""
    folder = tmp_path / "source"
    save(str(folder), CONFIG, params)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {
        "bos_token_id": 3, "pad_token_id": 4, "use_cache": True, "initializer_range": 0.02,
        "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16",
        "transformers_version": "4.44.0",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [1, 5], "temperature": 0.7, "pad_token_id": 6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("theirs")
    return folder


def test_a_source_loses_nothing_but_what_is_said_anew(tmp_path, params, source):
    config = load_config(str(source), rope_theta=4e4, max_position=512)
    save(str(tmp_path / "out"), config, params, source=str(source))
    assert load_config(str(tmp_path / "out")) == config
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, value in {
        "bos_token_id": 3, "pad_token_id": 4, "use_cache": True, "initializer_range": 0.02,
        "transformers_version": "4.44.0", "eos_token_id": 1, "dtype": "float32",
        "torch_dtype": "float32", "max_position_embeddings": 512, "rope_theta": 4e4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }.items():  # fmt: skip
        assert stored[name] == value, name
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 3, "pad_token_id": 6, "eos_token_id": [1, 5], "temperature": 0.7,
    }  # fmt: skip
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert names(tmp_path / "out") == [
        "chat_template.jinja", "config.json", "generation_config.json", WEIGHTS, "tokenizer.json",
    ]  # fmt: skip


def test_files_are_as_readable_as_any(tmp_path, params):
    save(str(tmp_path / "out"), CONFIG, params)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    plain = tmp_path / "plain"
    plain.write_text("")
    assert modes == {plain.stat().st_mode & 0o777}


def refused(parent: pathlib.Path, path: pathlib.Path, *args, **named) -> str:
    """The one line of a refused save, after which `parent` is as it was."""
    before = sorted(map(str, parent.rglob("*")))
    with pytest.raises(ModelError) as error:
        save(str(path), *args, **named)
    assert sorted(map(str, parent.rglob("*"))) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_with_anything_in_it_is_never_overwritten(tmp_path, params):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert f"{str(tmp_path / 'mine')!r} is not empty" in refused(
        tmp_path, tmp_path / "mine", CONFIG, params
    )
    assert "is a file" in refused(tmp_path, tmp_path / "mine" / "thesis.tex", CONFIG, params)
    below = tmp_path / "mine" / "thesis.tex" / "out"
    assert "cannot be written" in refused(tmp_path, below, CONFIG, params)


def test_an_empty_folder_and_missing_parents_will_do(tmp_path, params):
    (tmp_path / "empty").mkdir()
    save(str(tmp_path / "empty"), CONFIG, params)
    save(str(tmp_path / "a" / "b"), CONFIG, params)
    assert names(tmp_path / "empty") == names(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a", "empty"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, params, value):
    broken = params | {"norm": {"scale": jnp.full(32, value)}}
    message = refused(tmp_path, tmp_path / "out", CONFIG, broken)
    assert "model.norm.weight holds NaN or infinity" in message


def test_weights_that_float16_cannot_hold(tmp_path, params):
    large = params | {"norm": {"scale": jnp.full(32, 1e5)}}
    message = refused(tmp_path, tmp_path / "out", CONFIG, large, dtype="float16")
    assert "model.norm.weight holds more than float16 holds" in message
    save(str(tmp_path / "out"), CONFIG, large)
    with pytest.raises(ModelError, match="numbers that float16 cannot hold"):
        load(str(tmp_path / "out"), np.float16)


def test_params_of_another_config(tmp_path, params):
    other = tiny_config(num_layers=3, tie_embeddings=False)
    assert "layers.attention_norm.scale" in refused(tmp_path, tmp_path / "out", other, params)
    tied = tiny_config(num_layers=2)
    assert "head.kernel" in refused(tmp_path, tmp_path / "out", tied, params)


def test_a_tokenizer_that_cannot_be_saved_leaves_nothing(tmp_path, params):
    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        save(str(tmp_path / "out"), CONFIG, params, Broken())
    assert names(tmp_path) == []
