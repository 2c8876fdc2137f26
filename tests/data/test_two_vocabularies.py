"""A student of 151,936 rows and a teacher of 152,064, with the real vocabulary of Qwen.

Needs Qwen's list of ordinary tokens, `qwen.tiktoken` (QwenLM publishes it; the package `dashscope`
holds a copy): OPD_JAX_QWEN_TIKTOKEN=FILE pytest -m real tests/data/test_two_vocabularies.py
"""

import base64
import itertools
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

from opd_jax import config as configuration
from opd_jax import models, train
from opd_jax.models import decoder
from tests.support.families import CHATML, QWEN, R1

pytestmark = pytest.mark.real

ORDINARY = 151_643
R1_TEMPLATE = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last to make the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ORDINARY) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def ordinary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of Qwen in the byte-level alphabet."""
    file = os.environ.get("OPD_JAX_QWEN_TIKTOKEN")
    assert file, "set OPD_JAX_QWEN_TIKTOKEN to Qwen's qwen.tiktoken"
    lines = pathlib.Path(file).read_text().splitlines()
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(str.split, lines)}
    assert len(ranks) == ORDINARY
    spare = iter(range(256, 512))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)}

    def spell(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    pairs = (merge_of(token, ranks) for token in ranks if len(token) > 1)
    return {spell(t): i for t, i in ranks.items()}, [(spell(a), spell(b)) for a, b in pairs]


def make_folder(folder: pathlib.Path, ordinary, special, template, rows: int, end: int, seed: int):
    vocabulary, merges = ordinary
    inner = Tokenizer(bpe.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
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
