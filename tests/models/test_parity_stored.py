"""Our logits against stored ones of transformers on torch: parity without torch.

The weights are not stored: numpy makes them again from a seed, under their Hugging Face names.
`UPDATE_GOLDEN=1 pytest tests/models/test_parity_stored.py` writes tests/golden/parity.npz (torch).
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from opd_jax.models import decoder, hf_load

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "parity.npz"
ROWS, WIDTH, VOCAB = 2, 24, 61
CASES = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 12},
    "llama": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "qwen2 yarn": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8,
            "original_max_position_embeddings": 16,
        },
    },
}  # fmt: skip


def write_folder(folder: pathlib.Path, case: str) -> None:
    """config.json and model.safetensors of a random two-layer model, without our own `save`."""
    config = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    } | CASES[case]  # fmt: skip
    query, key = 4 * config["head_dim"], 2 * config["head_dim"]
    layer = {
        "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
        "self_attn.q_proj.weight": (query, 16), "self_attn.k_proj.weight": (key, 16),
        "self_attn.v_proj.weight": (key, 16), "self_attn.o_proj.weight": (16, query),
        "mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
    }  # fmt: skip
    if case.startswith("qwen2"):
        layer |= {f"self_attn.{x}_proj.bias": (key,) for x in "kv"}
        layer |= {"self_attn.q_proj.bias": (query,)}
    if case == "qwen3":
        layer |= {f"self_attn.{x}_norm.weight": (config["head_dim"],) for x in "qk"}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (VOCAB, 16), "model.norm.weight": (16,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, 16)

    random = np.random.RandomState(0)  # its stream is frozen for ever, default_rng's is not
    tensors = {
        name: (0.3 * random.standard_normal(shape) + ("norm" in name)).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def write_golden(folder: pathlib.Path) -> None:
    """Ask transformers on torch for the logits of every case."""
    import torch
    import transformers

    tokens = np.random.RandomState(1).randint(0, VOCAB, (ROWS, WIDTH))
    stored = {"tokens": tokens, "transformers": np.array(transformers.__version__)}
    for case in CASES:
        write_folder(folder, case)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            stored[case] = model.eval()(torch.tensor(tokens)).logits.numpy()
    np.savez_compressed(GOLDEN, **stored)


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> dict[str, np.ndarray]:
    """Tokens and torch logits of every case."""
    if os.environ.get("UPDATE_GOLDEN") == "1":
        write_golden(tmp_path_factory.mktemp("golden"))
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_stored_ones(tmp_path, golden, case):
    write_folder(tmp_path, case)
    config, params = hf_load.load(str(tmp_path))
    logits = jax.jit(decoder.forward, static_argnames="config")(
        params, config, golden["tokens"], np.full(ROWS, WIDTH)
    )
    assert golden[case].shape == (ROWS, WIDTH, VOCAB)
    np.testing.assert_allclose(logits, golden[case], atol=1e-4)
