"""Rebuild the two embedded models from scratch: python launch/make_tiny.py --out=DIR.

Trains a tokenizer on the generated problems, and then teacher and student by SFT (the same code path as
configs/sft.py), in under an hour on 2 cores. The student is smaller, and its last SFT stage has careless
solutions. It therefore knows arithmetic but often makes mistakes: it starts well below the teacher, but
close enough in distribution to learn from the teacher's scores of its rollouts.
"""

import pathlib
import shutil
import sys

from absl import flags
from ml_collections import ConfigDict
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_jax import cli
from opd_jax.config.fields import default
from opd_jax.data import arithmetic

flags.DEFINE_string("out", "opd_jax/tiny", "folder in which to write teacher/ and student/")
flags.DEFINE_string("workdir", "runs/make_tiny", "folder of the training runs")
flags.DEFINE_enum("only", "both", ["both", "teacher", "student"], "model to train")

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 320
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Layers, width, heads, key/value heads, mlp; then SFT stages: split, steps, learning rate.
RECIPES: dict[str, tuple] = {
    "teacher": (3, 128, 4, 2, 384, (("sft", 3500, 2e-3),)),
    "student": (2, 96, 4, 2, 256, (("sft", 3000, 2e-3), ("careless", 300, 5e-4))),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose merges never cross a digit, with Qwen's special tokens and ChatML.

    Merges are learned on finer pieces than those of Qwen2's pre-tokenizer, which splits texts afterwards.
    transformers applies Qwen2's pre-tokenizer to any folder with model_type qwen2, whatever its file says.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[A-Za-z]+|[^\w\s] ?"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    problems = (arithmetic.problem("sft", i) for i in range(5000))
    texts = (f"user\n{p.prompt}\nassistant\n{p.solution}" for p in problems)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, START_TURN, END_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TURN,
        pad_token=END,
        chat_template=TEMPLATE,
        model_max_length=512,
    )


def sft_config(student: str, split: str, steps: int, rate: float) -> ConfigDict:
    """Return a config for SFT on golden solutions, in one pass over generated problems."""
    config = default()
    config.student.path = student
    config.steps = steps
    config.data.train = f"tiny:{split}"
    config.data.size = 2_000_000
    config.rollout.prompts_per_step = 32
    config.rollout.max_prompt_tokens = 40
    config.rollout.max_response_tokens = 136
    config.loss.pg_weight = 0.0
    config.loss.lambda_gold = 1.0
    config.optim.learning_rate = rate
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = min(100, steps // 10)
    config.eval.every = 1000
    config.checkpoint.every = 1000
    config.eval.temperature = 1.0
    config.metrics.repetition_tail = 100
    config.metrics.repetition_threshold = 2.2
    config.log.every = 50
    return config


def make(name: str, out: pathlib.Path, workdir: pathlib.Path) -> None:
    """Initialise a model at random, train it in the stages of its recipe, and write it to `out`."""
    import jax

    from opd_jax import models as hf
    from opd_jax import train
    from opd_jax.models import decoder

    layers, width, heads, kv_heads, mlp, stages = RECIPES[name]
    tokenizer = make_tokenizer()
    model = hf.ModelConfig(
        model_type="qwen2", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=mlp,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads,
        rope_theta=10_000.0, rms_norm_eps=1e-6, max_position=512, tie_embeddings=True,
        qkv_bias=True, qk_norm=False, eos_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    params = decoder.init(jax.random.key(sum(map(ord, name))), model)
    for number, (split, steps, rate) in enumerate(stages):
        start = workdir / f"{name}-{number}-start"
        hf.save(str(start), model, params, tokenizer)
        config = sft_config(str(start), split, steps, rate)
        run = train.run(config, str(workdir / f"{name}-{number}"), command=sys.argv)
        params = run.state.params
    shutil.rmtree(out / name, ignore_errors=True)  # because save never overwrites a folder
    hf.save(str(out / name), model, params, tokenizer)


def main() -> None:
    """Train the models that --only selects."""
    out, workdir = pathlib.Path(cli.FLAGS.out), pathlib.Path(cli.FLAGS.workdir)
    for name in RECIPES if cli.FLAGS.only == "both" else [cli.FLAGS.only]:
        make(name, out, workdir)


if __name__ == "__main__":
    cli.main(main)
