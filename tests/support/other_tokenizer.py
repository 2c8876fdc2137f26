"""Folders of small models whose tokenizers merge the same bytes differently."""

import pathlib

import jax

from opd_jax import models
from opd_jax.models import decoder
from tests.support.tokenizers import merged

MERGES = {"student": ("1+0", "Ġ+=", "Ġ=+Ġ"), "teacher": ("Ġ+1", "=+Ġ", "Ġ1+0", "\\+b", "\\b+o")}


def pair(root: pathlib.Path) -> pathlib.Path:
    """Folders `student` and `teacher` of random weights under `root`, with different tokenizers."""
    for seed, (name, merges) in enumerate(MERGES.items()):
        tokenizer = merged(root / f"{name} tokenizer", merges, turn=5 * seed)
        model = models.ModelConfig(
            model_type="qwen2", vocab_size=tokenizer.size + seed, hidden_size=16, intermediate_size=32,
            num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6,
            max_position=512, tie_embeddings=True, qkv_bias=True, qk_norm=False,
            eos_token_ids=(tokenizer.hf.eos_token_id,),
        )  # fmt: skip
        params = decoder.init(jax.random.key(seed), model)
        models.save(str(root / name), model, params, tokenizer.hf)
    return root
