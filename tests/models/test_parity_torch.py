"""Our logits against transformers on torch, with small random models, both ways."""

import numpy as np
import pytest

from opd_jax.models import decoder, hf
from tests.conftest import noisy_params, random_rows, tiny_config

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
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama untied, llama3": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama linear": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LINEAR}),
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
    ours, params = hf.load(str(tmp_path))
    assert_same_on_real_tokens(decoder.forward(params, ours, ROWS, LENGTH), torch_logits(model))


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
            rope_scaling=hf.architecture.RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
    ids=["qwen2", "qwen3", "llama"],
)  # fmt: skip
def test_our_folder_gives_our_logits(tmp_path, config):
    params = noisy_params(config)
    hf.save(str(tmp_path), config, params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.eos_token_id == 1
    assert_same_on_real_tokens(decoder.forward(params, config, ROWS, LENGTH), torch_logits(model))
