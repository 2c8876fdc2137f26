"""Recipes: models, data, lengths and batch that every method shares. `FILE.py:RECIPE` picks one.

`RECIPE,student=DIR,teacher=NAME_OR_DIR,data=FILE` sets what most runs change. A model is a Hugging
Face folder or a hub name. `lora=RANK` trains adapters, at ten times the learning rate. Values of papers
stand beside their source; "unknown" marks what no source gives.
"""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

import opd_jax
from opd_jax.config.fields import default
from opd_jax.config.schema import near
from opd_jax.errors import ConfigError
from opd_jax.evaluation.protocols import BOXED

# A privileged teacher sees the golden solution; the wording is that of 2605.11182 (OPSD, "full").
PRIVILEGED = (
    "{problem}\n\nHere is a reference solution to this problem:\n{solution}\n"
    "After understanding the reference solution and the rationale behind each step, now articulate "
    "your own step-by-step reasoning that derives the same final answer to the problem above:\n"
    + BOXED
)
# Times the learning rate of all weights (Schulman et al., LoRA Without Regret, thinkingmachines.ai/blog/lora,
# 2025; second-hand), at any rank, with alpha 32 and power 1.
LORA_RATE = 10.0
TEACHERS = {
    "openthinker3-7b": "open-thoughts/OpenThinker3-7B",
    "r1-distill-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
}


def recipe(text: str | None, *, without: tuple[str, ...] = ()) -> ConfigDict:
    """The config of `RECIPE[,key=value...]`; methods (the other files here) then set their numbers.

    `without`: options that mean nothing to the method.
    """
    known = [key for key in OPTIONS if key not in without]
    name, *options = (text or "tiny").split(",")
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not known; {near(name, list(RECIPES))}")
    given = dict(option.partition("=")[::2] for option in options)
    unknown = [key for key, value in given.items() if key not in known or not value]
    if unknown:
        raise ConfigError(
            f"recipe {name!r} got option {unknown[0]!r}, wanted one of "
            f"{', '.join(f'{key}=VALUE' for key in known)}"
        )
    config = default()
    RECIPES[name](config)
    rank = given.pop("lora", "0")
    for key, value in given.items():
        section, field = OPTIONS[key]
        config[section][field] = TEACHERS.get(value, value) if key == "teacher" else value
    if not rank.isdecimal():
        raise ConfigError(
            f"recipe {name!r} got lora={rank!r}, wanted a whole number, the rank; set lora=64"
        )
    config.lora.rank = int(rank)
    config.optim.learning_rate *= rate_factor(config)
    if "teacher" in given:  # a stronger one, which needs no help
        config.data.teacher_prompt_template = "same"
        if "r1-distill" in config.teacher.path.lower():
            # Its template opens <think>, for which it has one token and the student several.
            config.scoring.mask_first = ("<", "think")  # 2603.25562
    return config


def rate_factor(config: ConfigDict) -> float:
    """Times a learning rate that is known for the training of all weights; 1 where all are trained."""
    return LORA_RATE if config.lora.rank else 1.0


OPTIONS = {
    "student": ("student", "path"),
    "teacher": ("teacher", "path"),
    "data": ("data", "train"),
    "eval": ("eval", "data"),
    "lora": ("lora", "rank"),
}


def tiny(config: ConfigDict) -> None:
    """The embedded world: two small Qwen2 models and multi-step arithmetic; 2 CPU cores, no network."""
    models = pathlib.Path(opd_jax.__file__).parent / "tiny"
    config.student.path = str(models / "student")
    config.teacher.path = str(models / "teacher")
    config.steps = 100
    config.rollout.prompts_per_step = 16
    config.rollout.samples_per_prompt = 4  # 2604.08527: "4 rollouts each"
    config.rollout.max_prompt_tokens = 40
    config.rollout.max_response_tokens = 160
    config.optim.microbatch_tokens = 3200  # activations fit the caches of a core
    config.optim.token_chunk = config.scoring.token_chunk = 4096  # all logits of a micro-batch
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = (
        10  # Adam's first steps are as large as its rate, whatever the noise
    )
    config.eval.temperature = 1.0  # the distribution that OPD trains
    config.eval.every = 25
    config.eval.slots = 64  # as many as the rollouts of a step: one decode program serves both
    config.metrics.repetition_tail = 100  # the paper's 10,000 characters can never occur here
    config.metrics.repetition_threshold = 2.2
    config.metrics.positions = (16, 32, 64, 128)


def smollm2_135m(config: ConfigDict) -> None:
    """A real model on a laptop's CPU or one GPU: SmolLM2-135M-Instruct on word problems.

    Needs a file of problems with solutions: `data=gsm8k_train.jsonl` (openai/grade-school-math).
    The teacher is the model itself, shown the solution; `teacher=HuggingFaceTB/SmolLM2-1.7B-Instruct`
    is a stronger one of the same tokenizer.
    """
    config.student.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.teacher.path = "student"
    config.data.train = ""
    config.data.bad_rows = "skip"
    config.data.prompt_template = "{problem}\n" + BOXED
    config.data.teacher_prompt_template = PRIVILEGED
    config.steps = 40
    config.rollout.prompts_per_step = 4
    config.rollout.samples_per_prompt = 2
    config.rollout.max_prompt_tokens = 192
    config.rollout.max_response_tokens = 192
    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 5
    config.optim.microbatch_tokens = 2048  # fits a laptop: 49,152 logits a token are the rest
    config.scoring.token_chunk = 128  # the logits of so few stay in the cache of a CPU
    config.optim.token_chunk = 512
    config.eval.data = ""
    config.eval.problems = 64
    config.eval.teacher = False
    config.metrics.repetition_tail = 200
    config.metrics.repetition_threshold = 4.0


def _stable_opd_paper(config: ConfigDict) -> None:
    """What 2604.08527 says, and what its evaluation protocol (LUFFY's) implies where it says nothing."""
    config.student.rope_theta = 40_000.0  # LUFFY's 16k student; the base model has 10,000
    config.student.max_position = 16_384  # likewise; 4,096 in the base model
    config.teacher.path = TEACHERS["openthinker3-7b"]
    config.data.train = ""  # OpenR1-Math, 13k problems: launch/prepare_data.py
    config.data.system_prompt = BOXED  # template: unknown; Qwen2.5-Math's own
    config.data.bad_rows = "skip"
    config.steps = 400  # unknown; the collapse came at 280 to 310
    config.rollout.prompts_per_step = 64  # found
    config.rollout.samples_per_prompt = 4  # found
    config.rollout.temperature = 1.0  # second-hand
    config.rollout.max_prompt_tokens = 1024  # unknown; LUFFY
    config.rollout.max_response_tokens = 8192  # unknown; golden solutions have up to 8,192 tokens
    config.optim.learning_rate = 1e-6  # second-hand
    config.optim.beta2 = 0.999  # unknown; verl's defaults
    config.optim.weight_decay = 0.01  # unknown; verl's default
    config.optim.grad_clip = 1.0  # unknown
    config.optim.remat = "attention"
    config.optim.microbatch_tokens = 32_768
    config.checkpoint.every = 20
    config.eval.data = ""
    config.eval.temperature = 0.6  # second-hand
    config.eval.every = 20
    config.eval.teacher = False


def qwen25_math_1_5b(config: ConfigDict) -> None:
    """The small student of 2604.08527: Qwen2.5-Math-1.5B, taught by OpenThinker3-7B or R1-Distill-7B.

    4 x H200 in the paper. Needs `data=opd.jsonl` of launch/prepare_data.py.
    """
    _stable_opd_paper(config)
    config.student.path = "Qwen/Qwen2.5-Math-1.5B"


def qwen25_math_7b(config: ConfigDict) -> None:
    """The large student of 2604.08527: Qwen2.5-Math-7B; otherwise like `qwen2.5-math-1.5b`."""
    _stable_opd_paper(config)
    config.student.path = "Qwen/Qwen2.5-Math-7B"
    config.optim.microbatch_tokens = 18_432  # two rows of a device
    config.log.gradients = (
        0  # they need 14.2 GiB more, and leave 4 x H200 less than the plan's margin
    )


def qwen3_1_7b(config: ConfigDict) -> None:
    """Qwen3-1.7B-Base taught by Qwen3-4B without thinking, as 2604.13016 does (Table 2).

    Needs `data=FILE`, such as DAPO-Math-17k after launch/prepare_data.py.
    """
    config.student.path = "Qwen/Qwen3-1.7B-Base"
    config.teacher.path = "Qwen/Qwen3-4B"
    config.student.enable_thinking = False
    config.teacher.enable_thinking = False
    config.data.train = ""
    config.data.prompt_template = "{problem} " + BOXED
    config.data.bad_rows = "skip"
    config.data.epochs = 1.0  # Table 2
    config.rollout.prompts_per_step = 64  # Table 2: global batch size
    config.rollout.samples_per_prompt = 4  # Table 2
    config.rollout.temperature = 1.0  # Table 2
    config.rollout.top_p = 1.0  # Table 2
    config.rollout.max_prompt_tokens = 1024  # Table 2
    config.rollout.max_response_tokens = 7168  # Table 2
    config.sample.problems = 200_000  # C.1: "we sample 200K math prompts"
    config.sample.temperature = 0.7  # C.1
    config.sample.top_p = 0.95  # C.1
    config.sample.max_response_tokens = 12_288  # C.1
    config.sample.batch = 512
    config.sample.slots = 48  # 2 GB of keys and values each, in bfloat16
    config.loss.aggregation = "token"  # its code
    config.optim.learning_rate = 1e-6  # Table 2
    config.optim.weight_decay = 0.01  # its code
    config.optim.remat = "attention"
    config.optim.microbatch_tokens = 32_768
    config.checkpoint.every = 20
    config.eval.data = ""
    config.eval.samples = 16  # section 3.1; its answers may have 31,744 tokens, here 7,168
    config.eval.temperature = 0.7  # section 3.1
    config.eval.top_p = 0.95  # section 3.1
    config.eval.every = 20
    config.eval.teacher = False


RECIPES: dict[str, Callable[[ConfigDict], None]] = {
    "tiny": tiny,
    "smollm2-135m": smollm2_135m,
    "qwen2.5-math-1.5b": qwen25_math_1_5b,
    "qwen2.5-math-7b": qwen25_math_7b,
    "qwen3-1.7b": qwen3_1_7b,
}
