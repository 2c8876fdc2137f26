"""config.json files as the hub has them, and files with fields left out, read as transformers reads.

The dicts are transcribed: fields that the models of this list write, with their values. Both ways of
writing RoPE are read: theirs (transformers < 5), and what transformers 5 makes of them.
"""

import copy

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from opd_jax.errors import ModelError
from opd_jax.models.config import ModelConfig, from_hf, to_hf

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536,
    "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 4096,
    "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.44.0",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_QWEN2_7B = _QWEN2 | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    "vocab_size": 152064,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_LLAMA31 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
CONFIGS = {
    "Qwen2.5-Math-1.5B": _QWEN2,
    "Qwen2.5-Math-7B": _QWEN2_7B,
    "Qwen2.5-Math-7B-16k-think": _QWEN2_7B | {
        "rope_theta": 40000, "max_position_embeddings": 16384,
    },
    "Qwen2.5-7B-Instruct with its YaRN": _QWEN2_7B | {
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "eos_token_id": 151645,
        "sliding_window": 131072,
        "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn",
        },
    },
    "R1-Distill-Qwen-1.5B": _QWEN2 | {
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "R1-Distill-Qwen-7B": _QWEN2_7B | {"max_position_embeddings": 131072},
    "OpenThinker3-7B": _QWEN2_7B | {
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "eos_token_id": 151645,
        "sliding_window": None, "layer_types": ["full_attention"] * 28,
    },
    "Qwen3-1.7B": _QWEN3,
    "Qwen3-1.7B-Base": _QWEN3 | {"max_position_embeddings": 32768, "eos_token_id": 151643},
    "Qwen3-4B": _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36,
    },
    "Llama-2-7B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": _LLAMA31,
    "Llama-3.1-8B-Instruct": _LLAMA31 | {"eos_token_id": [128001, 128008, 128009]},
    "Llama-3.2-3B": _LLAMA31 | {
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192,
        "num_attention_heads": 24, "num_hidden_layers": 28, "tie_word_embeddings": True,
        "rope_scaling": _LLAMA31["rope_scaling"] | {"factor": 32.0},
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    },
}  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")  # fmt: skip


def transformers_config(fields: dict):
    return CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(fields))


def assert_same_model(ours: ModelConfig, theirs) -> None:
    """Every field that changes a logit or where an answer ends."""
    eos = theirs.eos_token_id
    heads = theirs.num_attention_heads
    got = (
        ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.num_heads,
        ours.num_kv_heads, ours.head_dim, ours.rope_theta, ours.rms_norm_eps, ours.max_position,
        ours.tie_embeddings, ours.eos_token_ids,
    )  # fmt: skip
    assert got == (
        theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers,
        heads, theirs.num_key_value_heads,
        getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        theirs.rope_parameters["rope_theta"], theirs.rms_norm_eps, theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
        () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )  # fmt: skip
    scaling = ours.rope_scaling
    assert (scaling.kind if scaling else "default") == theirs.rope_parameters["rope_type"]
    if scaling:
        assert scaling.factor == theirs.rope_parameters["factor"]
        original = theirs.rope_parameters["original_max_position_embeddings"]
        assert scaling.original_max_position == original
    assert set(getattr(theirs, "layer_types", None) or ()) <= {"full_attention"}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_as_transformers_reads_them(name):
    ours = from_hf(CONFIGS[name], source=name)
    theirs = transformers_config(CONFIGS[name])
    assert_same_model(ours, theirs)
    assert_same_model(ours, transformers_config(to_hf(ours)))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_new_way_of_writing_is_the_same_model(name):
    new = transformers_config(CONFIGS[name]).to_dict()
    assert "rope_theta" not in new
    assert new["rope_parameters"]["rope_theta"] == from_hf(CONFIGS[name], source=name).rope_theta
    assert from_hf(new, source=name) == from_hf(CONFIGS[name], source=name)


def test_the_overrides_make_the_published_long_student():
    short, long = CONFIGS["Qwen2.5-Math-7B"], CONFIGS["Qwen2.5-Math-7B-16k-think"]
    assert from_hf(short, source="", rope_theta=40000, max_position=16384) == from_hf(
        long, source=""
    )


@pytest.mark.parametrize("family", ["Qwen2.5-Math-1.5B", "Qwen3-1.7B", "Llama-3.1-8B"])
def test_a_field_left_out_means_what_it_means_to_transformers(family):
    full = CONFIGS[family]
    optional = full.keys() - {"model_type", *SIZES}
    whole_heads = {"num_attention_heads": 32, "hidden_size": 4096}  # for the default of 32 kv heads
    for missing in [{name} for name in sorted(optional)] + [optional]:
        fields = {k: v for k, v in (full | whole_heads).items() if k not in missing}
        assert_same_model(from_hf(fields, source=str(missing)), transformers_config(fields))


@pytest.mark.parametrize("family", ["Qwen2.5-Math-1.5B", "Qwen3-1.7B", "Llama-3.1-8B"])
@pytest.mark.parametrize("name", ["num_key_value_heads", "eos_token_id", "rope_scaling"])
def test_null_fields(family, name):
    fields = CONFIGS[family] | {name: None}
    assert_same_model(from_hf(fields, source=name), transformers_config(fields))


def test_null_head_size_of_llama():
    fields = CONFIGS["Llama-3.1-8B"] | {"head_dim": None}
    assert_same_model(from_hf(fields, source=""), transformers_config(fields))


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_have_no_default(name):
    fields = {k: v for k, v in CONFIGS["Qwen3-1.7B"].items() if k != name}
    with pytest.raises(ModelError, match=f"{name} is None"):
        from_hf(fields, source="")


@pytest.mark.parametrize("name", ["Qwen2.5-Math-1.5B", "Qwen3-1.7B"])
def test_a_sliding_window_that_is_on_is_refused(name):
    with pytest.raises(ModelError, match="use_sliding_window"):
        from_hf(CONFIGS[name] | {"use_sliding_window": True}, source=name)
