"""On-policy self-distillation: the teacher is the student itself, shown a prompt of its own.

python launch/train.py --config=configs/opsd.py:smollm2-135m

The recipe `smollm2-135m` internalises a system prompt: the teacher is told to answer in French, the
student is told nothing, and after training it answers in French without being told. On 2 CPU cores
the share of French answers to held-out questions rises from 0 to a clear majority in some ten minutes
(docs/measurements/opsd.md). With other recipes, or `data.teacher_prompt_template`, the teacher sees the
answer or the whole golden solution instead (2605.11182).

`teacher.follow` says which weights teach: those of step 0 (frozen), their moving average (average),
or the student's own (live).
"""

import pathlib

from ml_collections import ConfigDict

from configs import recipes

SYSTEM_PROMPT = "You are a French assistant. Always answer in French."
# At least three common French words or French letters: English answers do not hold them.
FRENCH = (
    r"(?is)(?:(?:\b(?:le|la|les|des|du|est|une|et|dans|que|qui|pour|il|elle|un|ce|pas|je|vous|nous|sur"
    r"|avec|mon|bonjour|oui|[ldcjnms]['’])|[éèêàçôûîùœ]).*){3}"
)


def get_config(recipe: str | None = None) -> ConfigDict:
    """The teacher's weights and tokenizer are the student's; only what it is shown differs."""
    config = recipes.recipe(recipe, without=("teacher",))
    config.teacher.path = "student"
    if config.lora.rank:  # siyan-zhao/OPSD, scripts/run_opsd_1b.sh (d75fcc7), with a rank of 64
        config.lora.alpha = 128.0
        # Of Qwen3-1.7B; 2e-5 of Qwen3-4B in scripts/run_opsd.sh (c1a7c48).
        config.optim.learning_rate = 2e-4
    name = (recipe or "tiny").partition(",")[0]
    if name == "smollm2-135m":
        _internalise(config)
    elif name == "tiny":  # its models have 512 positions, and a letter is a token to them
        config.data.teacher_prompt_template = "{problem}\n{solution}"
    else:
        config.data.teacher_prompt_template = recipes.PRIVILEGED
    return config


def _internalise(config: ConfigDict) -> None:
    """Questions in, French out: short answers, so that half an hour of a laptop is enough."""
    here = pathlib.Path(__file__).parent
    config.data.train = config.data.train or str(here / "questions" / "train.jsonl")
    config.data.prompt_template = "{problem}"
    config.data.teacher_prompt_template = "same"
    config.data.teacher_system_prompt = SYSTEM_PROMPT
    config.steps = 20
    config.rollout.prompts_per_step = 32
    config.rollout.samples_per_prompt = 1
    config.rollout.max_prompt_tokens = 48
    config.rollout.max_response_tokens = 24  # which language it is shows early
    if not config.lora.rank:
        config.optim.learning_rate = 1e-4
    config.optim.schedule = "linear"
    config.eval.data = config.eval.data or str(here / "questions" / "test.jsonl")
    config.eval.match = FRENCH
    config.eval.temperature = 0.7
    config.eval.every = 10
    config.eval.teacher = True
