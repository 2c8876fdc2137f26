"""Our logits against transformers on torch, with small random models, both ways."""

import copy

import numpy as np
import pytest

from opd_jax import models
from opd_jax.models import config as architecture
from opd_jax.models import hf_load, rope
from opd_jax.models.rope_config import RopeScaling
from tests.conftest import noisy_params, random_rows, tiny_config
from tests.support import calls

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import transformers  # noqa: E402 (after the check for torch)

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama untied, llama3": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama linear": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3 yarn, all given": (
        "Qwen3",
        {
            "head_dim": 20,
            "rope_parameters": YARN
            | {
                "beta_fast": 8,
                "beta_slow": 2,
                "truncate": False,
                "mscale": 0.7,
                "mscale_all_dim": 2.0,
            },
        },
    ),
}
ROWS, LENGTH = random_rows(tiny_config(), 2, 40)


def torch_logits(model) -> np.ndarray:
    tokens = torch.tensor(np.asarray(ROWS), dtype=torch.long)
    mask = torch.tensor(np.arange(40)[None] < np.asarray(LENGTH)[:, None])
    with torch.no_grad():
        return model.eval()(tokens, attention_mask=mask.long()).logits.numpy()


def assert_same_on_real_tokens(got, want):
    real = np.arange(40)[None] < np.asarray(LENGTH)[:, None]
    assert np.std(want[real]) > 0.3  # logits of a model that says something
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_their_folder_gives_their_logits(tmp_path, case):
    family, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide them
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    ours, params = hf_load.load(str(tmp_path))
    assert_same_on_real_tokens(calls.forward(params, ours, ROWS, LENGTH), torch_logits(model))


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(num_layers=2),
        tiny_config(
            model_type="qwen3", num_layers=2, qkv_bias=False, qk_norm=True, head_dim=20,
            tie_embeddings=False,
        ),
        tiny_config(
            model_type="llama", num_layers=2, qkv_bias=False, tie_embeddings=False,
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        tiny_config(
            num_layers=2, rope_scaling=RopeScaling("yarn", 4.0, original_max_position=32)
        ),
    ],
    ids=["qwen2", "qwen3", "llama", "yarn"],
)  # fmt: skip
def test_our_folder_gives_our_logits(tmp_path, config):
    params = noisy_params(config)
    models.save(str(tmp_path), config, params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.eos_token_id == 1
    assert_same_on_real_tokens(calls.forward(params, config, ROWS, LENGTH), torch_logits(model))


FREQUENCIES = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, no factor": YARN | {"factor": None},
    "yarn, length of the model": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    "yarn, betas": YARN | {"beta_fast": 4, "beta_slow": 2},
    "yarn, null betas": YARN | {"beta_fast": None, "beta_slow": 0},
    "yarn, not rounded": YARN | {"truncate": False},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 2.0},
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, attention factor": YARN | {"attention_factor": 1.7, "mscale": 0.7, "mscale_all_dim": 1},
    "yarn, shrinking": YARN | {"factor": 0.5},
    "yarn, Qwen": YARN | {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, an empty ramp": YARN | {"original_max_position_embeddings": 2},
}


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", FREQUENCIES)
def test_frequencies_and_attention_factor(case, style):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for head_dim in (8, 64, 128):
        fields = {"model_type": "llama", **SIZES, "head_dim": head_dim, style: FREQUENCIES[case]}
        ours = architecture.from_hf(fields, source="test")
        for config in (fields, architecture.to_hf(ours)):  # theirs, and ours written back
            theirs = transformers.LlamaConfig.from_dict(copy.deepcopy(config))
            kind = theirs.rope_parameters["rope_type"]
            want, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
            np.testing.assert_allclose(rope.inverse_frequencies(ours), want.numpy(), rtol=2e-6)
            assert rope.attention_factor(ours.rope_scaling) == pytest.approx(factor, rel=1e-12)
