"""`config.json` -> `ModelConfig` and back, and every refusal on the way."""

import dataclasses

import pytest

from opd_jax.errors import ModelError
from opd_jax.models.config import eos_ids, from_hf, to_hf
from opd_jax.models.rope_config import RopeScaling
from tests.conftest import tiny_config

SOURCE = "folder/config.json"

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALED = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def hf_config(**changes: object) -> dict:
    """A small valid Llama config as transformers < 5 wrote it; a value of `...` removes the field."""
    config = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 7,
    } | changes  # fmt: skip
    return {name: value for name, value in config.items() if value is not ...}


def test_reads_every_field():
    assert from_hf(hf_config(), source=SOURCE) == tiny_config(
        model_type="llama", num_layers=2, rope_theta=5e5, rms_norm_eps=1e-5,
        tie_embeddings=False, qkv_bias=False, eos_token_ids=(7,),
    )  # fmt: skip


def test_mistral_without_a_window_is_a_llama_and_with_one_is_refused():
    found = from_hf(hf_config(model_type="mistral", sliding_window=None), source=SOURCE)
    assert found == dataclasses.replace(from_hf(hf_config(), source=SOURCE), model_type="mistral")
    written = to_hf(found)
    assert written["architectures"] == ["MistralForCausalLM"]
    assert written["sliding_window"] is None  # a missing one is 4096 to transformers
    assert from_hf(written, source=SOURCE) == found
    for changes in ({}, {"sliding_window": 4096}):
        with pytest.raises(ModelError, match="of Mistral sliding_window"):
            from_hf(hf_config(model_type="mistral", **changes), source=SOURCE)


def test_fields_that_switch_sliding_windows_off_are_read_over():
    changes = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}
    for layer_types in (["full_attention"] * 2, None, 3):
        config = hf_config(**changes, layer_types=layer_types)
        assert from_hf(config, source=SOURCE) == from_hf(hf_config(), source=SOURCE)


@pytest.mark.parametrize(
    ("kind", "qkv_bias", "qk_norm"),
    [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)],
)
def test_family_decides_biases_and_head_norms(kind, qkv_bias, qk_norm):
    model = from_hf(hf_config(model_type=kind), source=SOURCE)
    assert (model.qkv_bias, model.qk_norm) == (qkv_bias, qk_norm)


def test_rope_theta_of_old_and_new_configs():
    new = hf_config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 2e4})
    assert from_hf(hf_config(rope_theta=2e4), source=SOURCE).rope_theta == 2e4
    assert from_hf(new, source=SOURCE).rope_theta == 2e4
    assert from_hf(hf_config(rope_theta=...), source=SOURCE).rope_theta == 1e4


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeScaling("linear", 4.0)),
        ({"rope_scaling": LLAMA3}, SCALED),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 3e4}}, SCALED),
        ({"rope_scaling": None}, None),
        ({"rope_scaling": YARN}, RopeScaling("yarn", 4.0, original_max_position=64)),
        ({"rope_parameters": YARN}, RopeScaling("yarn", 4.0, original_max_position=64)),
        # transformers lets the older field win, and fills in the model's own length.
        ({"rope_scaling": LLAMA3, "rope_parameters": YARN}, SCALED),
        (
            {"rope_scaling": {"type": "yarn", "factor": None}},
            RopeScaling("yarn", 1.0, original_max_position=256),
        ),
        (
            {"rope_scaling": YARN | {"factor": None}},
            RopeScaling("yarn", 256 / 64, original_max_position=64),
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            RopeScaling("yarn", 4.0, original_max_position=32),
        ),
        (
            {
                "rope_scaling": YARN
                | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": False}
                | {"mscale": 0.7, "mscale_all_dim": 0.9}
            },
            RopeScaling(
                "yarn", 4.0, original_max_position=64, beta_fast=16.0, beta_slow=2.0,
                attention_factor=1.5, mscale=0.7, mscale_all_dim=0.9, truncate=False,
            ),
        ),
    ],
)  # fmt: skip
def test_rope_scaling_of_old_and_new_configs(fields, scaling):
    assert from_hf(hf_config(**fields), source=SOURCE).rope_scaling == scaling


def test_head_dim_is_free_and_defaults_to_hidden_over_heads():
    assert from_hf(hf_config(head_dim=20), source=SOURCE).head_dim == 20
    assert from_hf(hf_config(), source=SOURCE).head_dim == 32 // 4
    assert from_hf(hf_config(head_dim=None), source=SOURCE).head_dim == 32 // 4


def test_key_value_heads_default_to_heads():
    assert from_hf(hf_config(num_key_value_heads=...), source=SOURCE).num_kv_heads == 4


@pytest.mark.parametrize(
    ("value", "ids"), [(None, ()), (5, (5,)), ([5, 3, 5], (5, 3)), ([], ()), (0, (0,))]
)
def test_eos_is_absent_a_number_or_a_list(value, ids):
    assert eos_ids(value, 99, source=SOURCE) == ids


def test_overrides_act_as_if_the_file_said_so():
    def read(**changes):
        return from_hf(hf_config(**changes), source=SOURCE, rope_theta=4e4, max_position=512)

    plain = from_hf(hf_config(rope_theta=4e4, max_position_embeddings=512), source=SOURCE)
    assert read() == plain
    assert (plain.rope_theta, plain.max_position) == (4e4, 512)
    for name in ("rope_scaling", "rope_parameters"):
        scaled = read(**{name: LLAMA3 | {"rope_theta": 3e4}})
        assert (scaled.rope_theta, scaled.rope_scaling) == (4e4, SCALED)
    file = hf_config()
    assert from_hf(file, source=SOURCE, rope_theta=0.0, max_position=0) == from_hf(
        hf_config(), source=SOURCE
    )
    read(rope_parameters=YARN)
    assert file == hf_config()  # what was read is not changed


@pytest.mark.parametrize(
    ("override", "value"),
    [("rope_theta", value) for value in (-1.0, 1.0, 1e13, float("nan"), float("inf"), "1e4", True)]
    + [("max_position", value) for value in (-1, 1, 10**12, 512.0, "512", False, None)],
)
def test_bad_overrides(override, value):
    with pytest.raises(ModelError, match=f"{override} is overridden by ") as error:
        from_hf(hf_config(), source=SOURCE, **{override: value})
    assert str(error.value).startswith(SOURCE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model",
    [
        tiny_config(),
        tiny_config(model_type="qwen3", qkv_bias=False, qk_norm=True, head_dim=20),
        tiny_config(model_type="llama", qkv_bias=False, tie_embeddings=False, eos_token_ids=(3, 4)),
        tiny_config(model_type="llama", qkv_bias=False, eos_token_ids=()),
        tiny_config(model_type="llama", qkv_bias=False, rope_scaling=SCALED),
        tiny_config(rope_scaling=RopeScaling("linear", 4.0)),
        tiny_config(rope_scaling=RopeScaling("yarn", 4.0, original_max_position=64)),
        tiny_config(
            rope_scaling=RopeScaling(
                "yarn", 4.0, original_max_position=64, beta_fast=16.0, attention_factor=1.5,
                mscale=0.7, mscale_all_dim=0.9, truncate=False,
            )
        ),
    ],
    ids=["qwen2", "qwen3", "llama", "llama no eos", "llama3", "linear", "yarn", "yarn, all given"],
)  # fmt: skip
def test_round_trip(model):
    assert from_hf(to_hf(model), source=SOURCE) == model


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gemma2"}, "model_type"),
        ({"model_type": ...}, "model_type"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"intermediate_size": True}, "intermediate_size"),
        ({"max_position_embeddings": 256.0}, "max_position_embeddings"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": {"a": "b" * 500}}, "model_type"),
        ({"model_type": 3}, "model_type is 3"),
        ({"model_type": None}, "model_type is None"),
        ({"eos_token_id": 99}, "the vocabulary of 99 ids"),
        ({"eos_token_id": [7, 10**30]}, "the vocabulary of 99 ids"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "flat"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "['yarn']"),
        ({"rope_scaling": YARN | {"factor": -4.0}}, "rope factor"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_slow=32.0"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, "mscale"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "RoPE"),
    ],
)
def test_refusals_name_source_and_field_in_one_line(changes, field):
    with pytest.raises(ModelError) as error:
        from_hf(hf_config(**changes), source=SOURCE)
    message = str(error.value)
    assert message.startswith(f"{SOURCE}: ")
    assert field in message
    assert "\n" not in message
    assert len(message) < 300


def test_an_unknown_family_hints_at_a_near_name():
    with pytest.raises(ModelError, match=r"'qwen2_5' \(did you mean 'qwen2'\?\)"):
        from_hf(hf_config(model_type="qwen2_5"), source=SOURCE)
    with pytest.raises(ModelError) as error:
        from_hf(hf_config(model_type="gpt_neox"), source=SOURCE)
    assert "did you mean" not in str(error.value)
