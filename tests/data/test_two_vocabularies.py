"""A student of 151,936 rows and a teacher of 152,064, with the real vocabulary of Qwen.

Needs Qwen's list of ordinary tokens, `qwen.tiktoken` (QwenLM publishes it; the package `dashscope`
holds a copy): OPD_JAX_QWEN_TIKTOKEN=FILE pytest -m real tests/data/test_two_vocabularies.py
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from opd_jax import config as configuration
from opd_jax import models, train
from opd_jax.models import decoder
from tests.support import qwen_tokenizer
from tests.support.families import CHATML, QWEN, R1
from tests.support.qwen_tokenizer import ORDINARY

pytestmark = pytest.mark.real

R1_TEMPLATE = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def ordinary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of Qwen in the byte-level alphabet."""
    file = os.environ.get("OPD_JAX_QWEN_TIKTOKEN")
    assert file, "set OPD_JAX_QWEN_TIKTOKEN to Qwen's qwen.tiktoken"
    return qwen_tokenizer.ordinary(pathlib.Path(file))


def make_folder(folder: pathlib.Path, ordinary, special, template, rows: int, end: int, seed: int):
    vocabulary, merges = ordinary
    inner = qwen_tokenizer.inner(vocabulary, merges, special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, eos_token=special[end - ORDINARY]
    )
    model = models.ModelConfig(
        model_type="qwen2", vocab_size=rows, hidden_size=16, intermediate_size=32, num_layers=2,
        num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6,
        max_position=256, tie_embeddings=seed == 0, qkv_bias=True, qk_norm=False,
        eos_token_ids=(end,),
    )  # fmt: skip
    params = decoder.init(jax.random.key(seed), model)
    # The padding rows of both models shout: mass on them would show everywhere.
    top = params["embed"]["embedding"] if model.tie_embeddings else params["head"]["kernel"]
    loud = top.at[len(tokenizer) :].mul(300.0)
    if model.tie_embeddings:
        params["embed"]["embedding"] = loud
    else:
        params["head"]["kernel"] = loud
    models.save(str(folder), model, params, tokenizer)


@pytest.mark.parametrize("special_tokens", ["remap", "mask"])
@pytest.mark.parametrize("family", ["qwen", "r1"])
def test_two_widths_train_together(ordinary, tmp_path, family, special_tokens, capsys):
    make_folder(tmp_path / "student", ordinary, QWEN, CHATML, 151_936, 151_645, seed=0)
    special, template = (QWEN, CHATML) if family == "qwen" else (R1, R1_TEMPLATE)
    make_folder(tmp_path / "teacher", ordinary, special, template, 152_064, 151_643, seed=1)
    config = configuration.default()
    config.student.path, config.teacher.path = str(tmp_path / "student"), str(tmp_path / "teacher")
    config.steps = 2
    config.rollout.prompts_per_step, config.rollout.samples_per_prompt = 2, 2
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 48, 160
    config.scoring.special_tokens = special_tokens
    config.scoring.token_chunk = config.optim.token_chunk = 128
    config.loss.lambda_gold, config.loss.beta_kl = 0.1, 0.1
    config.optim.learning_rate = 1e-3
    config.eval.problems = 2
    config.log.rollouts = 4
    train.run(config, str(tmp_path / "run"), command=[])
    said = capsys.readouterr().out
    assert "of 151936 and 152064 rows" in said
    assert ("151645: <|im_end|> to the student, <｜Assistant｜> to the teacher" in said) == (
        family == "r1"
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        assert all(np.isfinite(value) for value in row.values())
        # Random models over 151,665 ids are close to uniform: log 151665 = 11.93 nats. Mass on the
        # padding rows, 300 times as loud, would take nearly all of it away.
        assert row["score/student_entropy"] > 11.5
        assert row["score/teacher_entropy"] > 11.5
        assert -12.5 < row["score/teacher_logprob_mean"] < -11.0
        assert row["rollout/sampler_logprob_gap_max"] < 1e-4
        assert row["loss/total"] != 0
    known = ORDINARY + len(QWEN)
    samples = (tmp_path / "run/rollouts.jsonl").read_text().splitlines()
    assert all(max(json.loads(line)["response_ids"]) < known for line in samples)
