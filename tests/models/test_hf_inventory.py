"""Tensors that config.json does not ask for, or asks for under another name: what each folder gets.

One command has every verdict: pytest -q tests/models/test_hf_inventory.py. A row of a table has the verdict
before the check was there (`was`) beside the one of now, which is what is tested.
"""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import ModelError
from opd_jax.models import check_weights, decoder, forward, hf_load, safetensors_files, save
from tests.conftest import noisy_params, random_rows, tiny_config

WEIGHTS = "model.safetensors"
LOADED, MISSING = "loaded without a word", "missing; download the folder again"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ATTENTION = "model.layers.1.self_attn."
TIED = tiny_config(num_layers=2)
CONFIGS = {
    "qwen2": TIED,
    "untied": tiny_config(num_layers=2, tie_embeddings=False),
    "qwen3": tiny_config(num_layers=2, model_type="qwen3", qkv_bias=False, qk_norm=True),
    "llama": tiny_config(num_layers=2, model_type="llama", qkv_bias=False),
}
PARAMS = {name: noisy_params(config) for name, config in CONFIGS.items()}

Tensors = dict[str, np.ndarray]


class Row(NamedTuple):
    """A folder of `model` with `extra` tensors, the verdict that it got, and what it gets now."""

    model: str
    extra: Tensors
    was: str
    now: str
    loads: bool = False


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def write(folder: pathlib.Path, model: str, change=lambda tensors: tensors) -> pathlib.Path:
    """A folder of the model whose tensors are what `change` makes of them."""
    save(str(folder), CONFIGS[model], PARAMS[model])
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def verdict(folder: pathlib.Path) -> tuple[str, bool]:
    """What a run says of the folder's weights, and whether it loads them."""
    try:
        lines = check_weights(str(folder), hf_load.load_config(str(folder)))
        hf_load.load(str(folder))
    except ModelError as error:
        said, loads = str(error), False
    else:
        said, loads = "; ".join(lines), True
    assert "\n" not in said
    return said, loads


LEFT_OVER = {
    "a bias on the output projection": Row(
        "qwen2", {ATTENTION + "o_proj.bias": ones(32)}, LOADED,
        "holds model.layers.*.self_attn.o_proj.bias, which a qwen2 model does not have"),
    "the same bias, all zeros": Row(
        "qwen2", {ATTENTION + "o_proj.bias": 0 * ones(32)}, LOADED,
        "not read: model.layers.*.self_attn.o_proj.bias (zeros)", True),
    "query biases of a Llama": Row(
        "llama", {f"model.layers.{i}.self_attn.q_proj.bias": ones(32) for i in range(2)}, LOADED,
        "holds model.layers.*.self_attn.q_proj.bias in 2 layers, which a llama model"),
    "biases of the MLP": Row(
        "llama", {"model.layers.0.mlp.down_proj.bias": ones(32)}, LOADED,
        "holds model.layers.*.mlp.down_proj.bias"),
    "a bias on the head": Row("untied", {"lm_head.bias": ones(99)}, LOADED, "holds lm_head.bias"),
    "norms of queries and keys in a Qwen2": Row(
        "qwen2", {ATTENTION + "q_norm.weight": ones(8), ATTENTION + "k_norm.weight": ones(8)}, LOADED,
        "holds model.layers.*.self_attn.k_norm.weight, model.layers.*.self_attn.q_norm.weight, which"),
    "biases of queries in a Qwen3": Row(
        "qwen3", {ATTENTION + "q_proj.bias": ones(32)}, LOADED, "which a qwen3 model does not have"),
    "a layer beyond num_hidden_layers": Row(
        "qwen2", {"model.layers.2.mlp.up_proj.weight": ones(48, 32)}, LOADED,
        "holds layers up to 2 (counted from 0), config.json has num_hidden_layers=2"),
    "norms around the MLP, as Gemma has them": Row(
        "llama", {"model.layers.0.pre_feedforward_layernorm.weight": ones(32)}, LOADED,
        "holds model.layers.*.pre_feedforward_layernorm.weight"),
    "attention sinks": Row("llama", {ATTENTION + "sinks": ones(4)}, LOADED, "self_attn.sinks"),
    "experts beside the MLP": Row(
        "qwen2", {"model.layers.0.mlp.experts.0.up_proj.weight": ones(48, 32),
                  "model.layers.0.mlp.gate.weight": ones(4, 32)}, LOADED,
        "holds model.layers.*.mlp.experts.0.up_proj.weight, model.layers.*.mlp.gate.weight"),
    "an adapter that is not merged": Row(
        "qwen2", {ATTENTION + "q_proj.lora_A.default.weight": ones(2, 32)}, LOADED,
        "an adapter that is not merged; merge it"),
    "an adapter with PEFT's prefix": Row(
        "qwen2", {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ones(2, 32)},
        "outside the decoder", "an adapter that is not merged; merge it"),
    "an adapter of the embedding": Row(
        "qwen2", {"base_model.model.model.embed_tokens.lora_embedding_A": ones(2, 99)},
        "outside the decoder", "an adapter that is not merged; merge it"),
    "a bias without the prefix model.": Row(
        "qwen2", {"layers.1.self_attn.o_proj.bias": ones(32)}, "outside the decoder",
        "holds layers.1.self_attn.o_proj.bias, which a qwen2 model does not have"),
    "the same bias, all zeros, without the prefix": Row(
        "qwen2", {"layers.1.self_attn.o_proj.bias": 0 * ones(32)}, "outside the decoder",
        "not read: layers.1.self_attn.o_proj.bias (zeros)", True),
    "a norm inside a wrapper": Row(
        "qwen2", {"_orig_mod.model.layers.0.self_attn.q_norm.weight": ones(8)}, "outside the decoder",
        "would change the logits; save the model inside its wrapper"),
    "layers of a vision tower and of multi-token prediction": Row(
        "qwen2", {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": ones(8, 8),
                  "base_model.model.visual.layers.0.q_proj.lora_A.weight": ones(2, 8),
                  "mtp.layers.0.mlp.up_proj.weight": ones(48, 32)}, LOADED, "not read: ", True),
    "scales of weights that were quantised": Row(
        "qwen2", {"model.layers.0.mlp.up_proj.weight_scale": ones(48, 1)}, LOADED,
        "the weights are quantised; use a checkpoint that is not"),
    "embeddings of positions": Row(
        "llama", {"model.embed_positions.weight": ones(64, 32)}, LOADED, "model.embed_positions.weight"),
    "buffers of RoPE and masks": Row(
        "qwen2", {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ones(4) for i in range(2)}
        | {ATTENTION + "masked_bias": ones()}, LOADED,
        "not read: model.layers.*.self_attn.rotary_emb.inv_freq in 2 layers (computed from "
        "config.json); model.layers.*.self_attn.masked_bias (causal masks)", True),
    "scales of an 8-bit cache": Row(
        "llama", {ATTENTION + "k_scale": ones(1)}, LOADED, "(scales of 8-bit caches)", True),
    "a vision tower": Row(
        "qwen2", {"visual.blocks.0.attn.qkv.weight": ones(4, 4), "model.visual.merger.weight": ones(4)},
        LOADED, "not read: model.visual.merger.weight (images and sound); "
        "visual.blocks.0.attn.qkv.weight (outside the decoder)", True),
    "a value head": Row(
        "qwen2", {"v_head.summary.weight": ones(1, 32)}, LOADED,
        "not read: v_head.summary.weight (outside the decoder)", True),
    "multi-token prediction": Row(
        "qwen2", {"model.mtp_layers.0.input_proj.weight": ones(4, 4)}, LOADED,
        "(multi-token prediction)", True),
}  # fmt: skip


@pytest.mark.parametrize("row", LEFT_OVER.values(), ids=LEFT_OVER)
def test_tensors_that_nobody_asks_for(row, tmp_path):
    says, loads = verdict(write(tmp_path / "m", row.model, lambda tensors: tensors | row.extra))
    assert row.now in says
    assert loads == row.loads


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def prefixed(prefix: str):
    return renamed(lambda name: prefix + name)


def text_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def inside(part: str):
    return renamed(lambda name: name.replace("self_attn.", f"{part}.self_attn."))


MISNAMED = {
    "module.": (prefixed("module."), f"has module.{EMBEDDING}: 26 of 26 names have the prefix 'module.'"),
    "_orig_mod.": (prefixed("_orig_mod."), "26 of 26 names have the prefix '_orig_mod.'"),
    "language_model.": (prefixed("language_model."), "have the prefix 'language_model.'"),
    "base_model.model.": (prefixed("base_model.model."), "have the prefix 'base_model.model.'"),
    "module._orig_mod.": (prefixed("module._orig_mod."), "have the prefix 'module._orig_mod.'"),
    "policy. and more beside it": (
        lambda tensors: prefixed("policy.")(tensors) | {"value.weight": ones(1, 32)},
        "26 of 27 names have the prefix 'policy.'"),
    "model.language_model.": (
        renamed(text_model), "have the prefix 'model.language_model.' where 'model.' is wanted"),
    "transformer.": (
        renamed(lambda name: name.replace("model.", "transformer.", 1)),
        "have the prefix 'transformer.' where 'model.' is wanted"),
    "without model.": (
        renamed(lambda name: name.removeprefix("model.")),
        "has embed_tokens.weight: its names lack the prefix 'model.'"),
    "_fsdp_wrapped_module inside": (
        inside("_fsdp_wrapped_module"),
        "has model.layers.0._fsdp_wrapped_module.self_attn.k_proj.bias: its names have "
        "'_fsdp_wrapped_module' inside"),
    "base_layer of an adapter": (
        renamed(lambda name: name.replace("q_proj.", "q_proj.base_layer.")),
        "self_attn.q_proj.base_layer.bias: its names have 'base_layer' inside"),
    "_checkpoint_wrapped_module inside": (
        inside("_checkpoint_wrapped_module"), "'_checkpoint_wrapped_module' inside"),
    "fused queries, keys, values": (
        renamed(lambda name: name.replace("k_proj", "qkv_proj")), "self_attn.qkv_proj.bias: use a"),
    "names of another library": (
        renamed(lambda name: f"blk.{zlib_name(name)}"), "the folder has 26 tensors of other names (blk."),
}  # fmt: skip


def zlib_name(name: str) -> str:
    return name.replace("model", "m").replace(".", "_").replace("layers", "l")


@pytest.mark.parametrize(("change", "says"), MISNAMED.values(), ids=MISNAMED)
def test_tensors_under_other_names(change, says, tmp_path):
    """All of them were: missing; download the folder again."""
    message, loads = verdict(write(tmp_path / "m", "qwen2", change))
    assert not loads
    assert "is missing, config.json asks for it; the folder has " in message
    assert says in message
    assert "download" not in message


def test_what_is_absent_is_still_told_so(tmp_path):
    name = ATTENTION + "k_proj.bias"
    folder = write(
        tmp_path / "m", "qwen2", lambda tensors: {k: v for k, v in tensors.items() if k != name}
    )
    assert verdict(folder)[0] == (
        f"{folder}: tensor {name} is missing, config.json asks for it; download the folder again"
    )


def test_fewer_layers_than_config_json_has(tmp_path):
    folder = write(tmp_path / "m", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert (
        "the folder has layers up to 1 (counted from 0): correct num_hidden" in verdict(folder)[0]
    )


def own_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: np.flip(tensors[EMBEDDING], 0).copy()}


def one_number(tensors: Tensors) -> Tensors:
    head = tensors[EMBEDDING].copy()
    head[98, 31] += 1
    return tensors | {HEAD: head}


NOT_TIED = f"config.json sets tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: not tied"
HEADS = {  # the head's change, whether it is tied now, what is said. All were tied, without a word.
    "equal": (lambda t: t | {HEAD: t[EMBEDDING]}, True, f"{HEAD} (equal to the embedding, tied)"),
    "equal, in float16 both": (
        lambda t: t | {name: t[EMBEDDING].astype(np.float16) for name in (HEAD, EMBEDDING)}, True,
        "equal to the embedding"),
    "equal numbers, another dtype": (
        lambda t: t | {EMBEDDING: t[EMBEDDING].astype(np.float16),
                       HEAD: t[EMBEDDING].astype(np.float16).astype(np.float32)}, True,
        "equal to the embedding"),
    "another": (own_head, False, NOT_TIED),
    "another in its last number": (one_number, False, NOT_TIED),
    "rounded to float16": (
        lambda t: t | {HEAD: t[EMBEDDING].astype(np.float16)}, False, NOT_TIED),
    "none": (lambda t: t, True, ""),
    "only a head, no embedding": (lambda t: {k: v for k, v in own_head(t).items() if k != EMBEDDING},
                                  True, ""),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [128, safetensors_files.CHUNK])
@pytest.mark.parametrize(("change", "tied", "says"), HEADS.values(), ids=HEADS)
def test_a_head_beside_tied_embeddings_is_compared(
    change, tied, says, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(safetensors_files, "CHUNK", chunk)
    folder = write(tmp_path / "m", "qwen2", change)
    config, params = hf_load.load(str(folder))
    assert config.tie_embeddings == tied
    assert ("head" not in params) == tied
    assert config == hf_load.load_config(str(folder))
    said = "; ".join(check_weights(str(folder), config))
    assert says in said if says else not said
    stored = load_file(folder / WEIGHTS)
    np.testing.assert_array_equal(
        decoder.head(params), stored[EMBEDDING if tied and EMBEDDING in stored else HEAD]
    )


@pytest.mark.parametrize("change", [own_head, lambda t: t | {HEAD: t[EMBEDDING]}])
def test_logits_are_those_of_the_head_that_is_there(change, tmp_path):
    folder = write(tmp_path / "m", "qwen2", change)
    config, params = hf_load.load(str(folder))
    tokens_BT, length_B = random_rows(config, 2, 5)
    head = jnp.asarray(load_file(folder / WEIGHTS)[HEAD])
    hidden = decoder.hidden_states(params, config, tokens_BT, length_B)
    np.testing.assert_array_equal(
        forward(params, config, tokens_BT, length_B), decoder.logits(head, hidden)
    )


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (np.full((99, 32), np.nan, np.float32), f"{HEAD} holds NaN"),
        (ones(98, 32), f"{HEAD} has shape (98, 32)"),
        (np.ones((99, 32), np.int8), f"{HEAD} has dtype I8"),
    ],
)
def test_a_head_of_its_own_is_checked_like_any_other(head, says, tmp_path):
    folder = write(tmp_path / "m", "qwen2", lambda tensors: tensors | {HEAD: head})
    assert says in verdict(folder)[0]


def test_untied_means_untied(tmp_path):
    """config.json's word stands where it asks for more: a head that is equal, or that is missing."""
    folder = write(tmp_path / "a", "untied", lambda t: t | {HEAD: t[EMBEDDING]})
    assert "head" in hf_load.load(str(folder))[1]
    assert verdict(folder) == ("", True)
    folder = write(tmp_path / "b", "untied", lambda t: {k: v for k, v in t.items() if k != HEAD})
    assert f"tensor {HEAD} is missing" in verdict(folder)[0]


def test_an_untied_model_is_saved_untied(tmp_path):
    folder = write(tmp_path / "m", "qwen2", own_head)
    config, params = hf_load.load(str(folder))
    save(str(tmp_path / "out"), config, params, source=str(folder))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    again = hf_load.load(str(tmp_path / "out"))[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_folder_without_weights_says_nothing_yet(tmp_path):
    folder = write(tmp_path / "m", "qwen2")
    (folder / WEIGHTS).unlink()
    assert check_weights(str(folder), hf_load.load_config(str(folder))) == []
