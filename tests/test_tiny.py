"""The embedded world, as shipped: small, readable, and a student that Stable-OPD makes better."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opd_jax
from configs import stable_opd
from opd_jax import data, models, train
from tests.support import calls

FOLDER = pathlib.Path(opd_jax.__file__).parent / "tiny"


def test_both_models_are_hugging_face_folders_under_4_mb():
    for name in ("student", "teacher"):
        files = {file.name for file in (FOLDER / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
        assert json.loads((FOLDER / name / "config.json").read_text())["model_type"] == "qwen2"
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.*")) < 4e6


@pytest.mark.slow
@pytest.mark.short
def test_student_is_close_enough_to_learn_from_the_teacher():
    """The mean reverse KL per token on the student's own rollouts is well under 1 nat."""
    student_config, student = models.load(str(FOLDER / "student"))
    teacher_config, teacher = models.load(str(FOLDER / "teacher"))
    tokenizer = data.Tokenizer(str(FOLDER / "student"))
    assert tokenizer.vocabulary() == data.Tokenizer(str(FOLDER / "teacher")).vocabulary()
    prompts = [tokenizer.chat(data.problem("train", i).prompt) for i in range(32)]
    rollout = calls.roll(
        student, student_config, prompts, key=jax.random.key(0), max_response_tokens=160,
        stop_ids=student_config.eos_token_ids, max_prompt_tokens=40,
    )  # fmt: skip
    tokens, length = jnp.asarray(rollout.tokens_BT), jnp.asarray(rollout.length_B)
    scores = calls.score(
        student, student_config, teacher, teacher_config, tokens, length,
        vocabulary=tokenizer.size, top_k=16, token_chunk=1024, microbatch_tokens=8192,
    )  # fmt: skip
    mask = rollout.response_mask_BT
    assert 0.05 < np.mean(np.asarray(scores.reverse_kl_BT)[mask]) < 0.5
    gap = np.abs(np.asarray(scores.student_logprob_BT) - rollout.sampler_logprob_BT)[mask]
    assert gap.max() < 1e-4


@pytest.mark.slow
@pytest.mark.long
def test_stable_opd_makes_the_student_better(tmp_path):
    """Mean of 3 seeds: accuracy up by at least 15 points, reverse KL to the teacher at least halved."""
    gains, ratios = [], []
    for seed in range(3):
        config = stable_opd.get_config()
        config.seed = seed
        table = train.run(config, str(tmp_path / str(seed)), command=["test"]).table
        gains.append(table["student after"]["accuracy"] - table["student before"]["accuracy"])
        lines = (tmp_path / str(seed) / "metrics.jsonl").read_text().splitlines()
        kl = [row["score/reverse_kl"] for row in map(json.loads, lines) if row["step"]]
        ratios.append(np.mean(kl[-10:]) / kl[0])
        assert table["teacher"]["accuracy"] > 0.88
    assert np.mean(gains) >= 0.15, gains
    assert np.mean(ratios) <= 0.5, ratios
