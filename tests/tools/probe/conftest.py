"""Models, problems and a workdir that probes can afford."""

import json
import pathlib

import pytest

from opd_jax import config as configuration
from opd_jax import models
from tests.checkpoint.test_export import write_run
from tests.conftest import noisy_params
from tests.data.test_vocabulary import CHATML, QWEN, make

# The same special tokens under other numbers, and a template with a turn of its own.
SHUFFLED = ("<tool>", "<|im_end|>", "<|endoftext|>", "<|im_start|>")


TERSE = "{% for m in messages %}<|im_start|>Q {{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """Random models `student`, `teacher` (the student's ids), `other` (special ids of its own)."""
    root = tmp_path_factory.mktemp("models")
    kinds = {"student": (QWEN, CHATML), "teacher": (QWEN, CHATML), "other": (SHUFFLED, TERSE)}
    for seed, (name, (special, template)) in enumerate(kinds.items()):
        tokenizer = make(root / f"{name}-tokenizer", special, template)
        model = models.ModelConfig(
            model_type="qwen2", vocab_size=260, hidden_size=16, intermediate_size=32, num_layers=2,
            num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6,
            max_position=80, tie_embeddings=True, qkv_bias=True, qk_norm=False,
            eos_token_ids=(256 + special.index("<|endoftext|>"),),
        )  # fmt: skip
        models.save(str(root / name), model, noisy_params(model, seed), tokenizer.hf)
    return root


def questions(file: pathlib.Path, **more: object) -> str:
    rows = [{"problem": f"{i}+2=", "answer": str(i + 2), **more} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def small(folders, tmp_path):
    """Seven problems, responses of 24 tokens, batches of four."""
    config = configuration.default()
    config.student.path, config.teacher.path = str(folders / "student"), str(folders / "teacher")
    config.data.train = questions(tmp_path / "problems.jsonl")
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 40, 24
    config.rollout.temperature = 1.0
    config.probe.problems, config.probe.batch = 7, 4
    config.scoring.token_chunk = 64
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A workdir with the steps 2 and 10, at which every weight is 2 and 10 more than at the start."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, (2, 10))
    return folder
