"""Folders of adapters in PEFT's format: names, round trip, refusals."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import ModelError
from opd_jax.models import hf_adapters
from opd_jax.models.low_rank import LowRank
from tests.conftest import tiny_config
from tests.models.test_low_rank import SPEC, noisy_adapters

pytestmark = pytest.mark.short
CONFIG = tiny_config(num_layers=2)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    path = tmp_path / "adapters"
    hf_adapters.save(str(path), noisy_adapters(), SPEC, source="some/base", base="abc")
    return path


def change(folder: pathlib.Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_names_and_shapes_are_those_of_peft(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    a = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    pair = noisy_adapters()["layers"]["key"]
    np.testing.assert_array_equal(a, pair["lora_a"][1].T)
    np.testing.assert_array_equal(b, pair["lora_b"][1].T)
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in tensors
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 4, 8)
    assert fields["base_model_name_or_path"] == "some/base"
    assert sorted(fields["target_modules"]) == sorted(SPEC.targets)


def test_round_trip(folder):
    found = hf_adapters.open_folder(str(folder), CONFIG)
    assert (found.low_rank, found.base) == (SPEC, "abc")
    jax.tree.map(np.testing.assert_array_equal, hf_adapters.load(found, CONFIG), noisy_adapters())
    hf_adapters.require_base(found, "abc")


@pytest.mark.parametrize(
    ("power", "alpha", "flag"), [(0.5, 8, True), (1.0, 8, False), (0.0, 32, False)]
)
def test_the_scale_survives(tmp_path, power, alpha, flag):
    spec = LowRank(4, 8.0, power, ("q_proj",))
    adapters = noisy_adapters(CONFIG, spec)
    hf_adapters.save(str(tmp_path / "a"), adapters, spec, source="b", base="")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["lora_alpha"], fields["use_rslora"]) == (alpha, flag)
    found = hf_adapters.open_folder(str(tmp_path / "a"), CONFIG)
    assert found.low_rank.scale == pytest.approx(spec.scale)
    assert found.low_rank.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "asks for DoRA, which is not implemented"),
        ({"use_qalora": True}, r"a quantised base \(QALoRA\)"),
        ({"loftq_config": {"loftq_bits": 4}}, r"a quantised base \(LoftQ\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "weights that are trained whole"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks that differ"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', wanted LORA"),
        ({"r": 0}, "r is 0, wanted a positive integer"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', wanted a positive number"),
        ({"r": 8}, r"lora_A.weight has shape \(4, 32\), and r=8 .* asks for \(8, 32\)"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(ModelError, match=message) as caught:
        hf_adapters.open_folder(str(folder), CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", "is no adapter of q_proj"),
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", "in 2 layers"),
    ],
)
def test_other_tensors_are_refused(folder, name, message):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {name: np.zeros((4, 32), np.float32)}, file)
    with pytest.raises(ModelError, match=message):
        hf_adapters.open_folder(str(folder), CONFIG)


def test_a_missing_factor_is_refused(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight is missing"):
        hf_adapters.open_folder(str(folder), CONFIG)


def test_missing_and_broken_folders_are_refused(tmp_path, folder):
    with pytest.raises(ModelError, match="does not exist"):
        hf_adapters.open_folder(str(tmp_path / "none"), CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        hf_adapters.open_folder(str(folder), CONFIG)


def test_another_base_is_refused(folder):
    found = hf_adapters.open_folder(str(folder), CONFIG)
    with pytest.raises(ModelError, match="belong to a base with the hash abc, and the tensors"):
        hf_adapters.require_base(found, "f" * 64)


def test_nothing_is_written_over_a_folder(folder):
    with pytest.raises(ModelError, match="is not empty"):
        hf_adapters.save(str(folder), noisy_adapters(), SPEC, source="b", base="")
