"""Adapters against transformers on torch: logits and gradients of a model with an exported folder.

PEFT is not used: `adapted` computes its forward pass, `W x + s B (A x)`, from the tensors of the folder by
their names.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax import models
from opd_jax.models import decoder, hf_adapters, hf_load, low_rank
from opd_jax.models.low_rank import TARGETS, LowRank
from tests.models.test_low_rank import noisy_adapters
from tests.models.test_parity_torch import LENGTH, ROWS, SIZES

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import transformers  # noqa: E402 (after the check for torch)

CASES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, LowRank(4, 8.0, 1.0, tuple(TARGETS))),
    "qwen3": ("Qwen3", {"head_dim": 20}, LowRank(3, 8.0, 0.5, ("q_proj", "v_proj", "down_proj"))),
    "llama": ("Llama", {"head_dim": 12}, LowRank(4, 6.0, 1.0, tuple(TARGETS))),
}
REAL = np.arange(40)[None] < np.asarray(LENGTH)[:, None]
COUNTED = REAL[:, 1:]  # tokens that something predicts


def adapted(model, folder):
    """Put the adapters of a folder beside the linear layers of a model; return its parameters by name."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    power = 0.5 if fields["use_rslora"] else 1.0
    scale = fields["lora_alpha"] / fields["r"] ** power
    tensors = {
        name.removeprefix("base_model.model."): torch.tensor(value, requires_grad=True)
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    for name, module in model.named_modules():
        if (key := f"{name}.lora_A.weight") in tensors:
            pair = tensors[key], tensors[f"{name}.lora_B.weight"]

            def forward(x, module=module, pair=pair):
                base = torch.nn.functional.linear(x, module.weight, module.bias)
                return base + scale * (x @ pair[0].T) @ pair[1].T

            module.forward = forward
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_torch(tmp_path, case):
    family, changes, spec = CASES[case]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(theirs).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "base")
    config, base = hf_load.load(str(tmp_path / "base"))
    config = dataclasses.replace(config, lora_scale=spec.scale)
    adapters = noisy_adapters(config, spec)
    hf_adapters.save(str(tmp_path / "a"), adapters, spec, source=str(tmp_path / "base"), base="")

    tensors = adapted(model, tmp_path / "a")
    tokens = torch.tensor(np.asarray(ROWS), dtype=torch.long)
    logits = model(tokens, attention_mask=torch.tensor(REAL).long()).logits
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    loss = -logprobs[torch.tensor(COUNTED)].mean()
    loss.backward()

    def ours(adapters):
        logits = decoder.forward(low_rank.join(base, adapters), config, ROWS, LENGTH)
        logprob = jax.nn.log_softmax(logits[:, :-1])
        taken = jnp.take_along_axis(logprob, ROWS[:, 1:, None], -1)[..., 0]
        return -jnp.sum(jnp.where(COUNTED, taken, 0.0)) / COUNTED.sum(), logits

    (value, got), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(adapters)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(got)[REAL], logits.detach().numpy()[REAL], atol=1e-4)
    hf_adapters.save(str(tmp_path / "g"), gradients, spec, source="", base="")
    written = load_file(tmp_path / "g" / "adapter_model.safetensors")
    assert len(written) == len(tensors) == 2 * len(spec.targets) * config.num_layers
    for name, gradient in written.items():
        wanted = tensors[name.removeprefix("base_model.model.")].grad.numpy()
        assert np.abs(wanted).max() > 1e-4, name
        np.testing.assert_allclose(gradient, wanted, atol=1e-5, err_msg=name)


def test_merged_export_gives_their_logits(tmp_path):
    """A folder saved with the adapters merged is the adapted model to transformers."""
    family, changes, spec = CASES["llama"]
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(theirs).float().eval()
    model.save_pretrained(tmp_path / "base")
    config, base = hf_load.load(str(tmp_path / "base"))
    adapters = noisy_adapters(config, spec)
    hf_adapters.save(str(tmp_path / "a"), adapters, spec, source="", base="")
    merged = low_rank.merge(low_rank.join(base, adapters), spec.scale)
    folder = tmp_path / "merged"
    models.save(str(folder), config, merged)
    adapted(model, tmp_path / "a")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokens = torch.tensor(np.asarray(ROWS), dtype=torch.long)
    with torch.no_grad():
        one, other = model(tokens).logits.numpy(), again(tokens).logits.numpy()
    np.testing.assert_allclose(one[REAL], other[REAL], atol=1e-4)
