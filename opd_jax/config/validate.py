"""The rules of the config: what is impossible, would be ignored or could not work, refused in one line.

`validate` is called once, before anything is loaded.
"""

import datetime
import math
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config import guard_limits
from opd_jax.config.fields import default
from opd_jax.config.no_effect import unused
from opd_jax.config.schema import _check_kind, _choice, _range, _wrong, flatten, suggest
from opd_jax.errors import ConfigError
from opd_jax.grading.extract import FALLBACKS, GRADERS
from opd_jax.losses import AGGREGATIONS, DIRECTIONS, ESTIMATORS, FORMS, SUPPORT_WEIGHTS
from opd_jax.metrics.repetition import RULES
from opd_jax.models.remat import POLICIES
from opd_jax.scoring.topk import SUPPORTS
from opd_jax.sharding.partition import ROLES

DTYPES = ("auto", "float32", "bfloat16")
# Metrics by which a best checkpoint is kept; True where more is better.
BEST = {
    "accuracy": True, "matched": True, "truncation_rate": False, "repetition_rate": False,
    "unparsed": False, "length_mean": False,
}  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Refuse impossible values and combinations, before anything is loaded.

    Raises ConfigError with one line: the field, what it is, what is wanted, the option that fixes it.
    """
    _check_names(config.to_dict(), default().to_dict(), "")
    flat = flatten(config.to_dict())
    for field in ("steps", "data.size", "rollout.prompts_per_step", "rollout.samples_per_prompt",
                  "rollout.max_prompt_tokens", "rollout.max_response_tokens", "scoring.token_chunk",
                  "optim.token_chunk",
                  "scoring.overlap_top_k", "loss.top_k", "loss.truncated_tail",
                  "optim.microbatch_tokens", "optim.updates_per_rollout",
                  "checkpoint.keep", "eval.problems", "eval.samples", "eval.batch",
                  "metrics.repetition_tail",
                  "log.every", "sample.samples", "sample.batch", "rollout.repetition_period",
                  "guard.max_rollbacks", "probe.problems", "probe.batch",
                  "profile.start_step"):  # fmt: skip
        _range(flat, field, 1, math.inf)
    for field in ("rollout.slots", "loss.lambda_gold", "loss.beta_kl", "loss.pg_weight",
                  "optim.warmup_steps", "optim.weight_decay", "checkpoint.every", "eval.every",
                  "rollout.temperature", "eval.temperature", "log.rollouts", "log.gradients", "seed",
                  "loss.clip_high", "loss.divergence_weight", "loss.teacher_coef", "loss.group_coef",
                  "loss.advantage_clamp", "loss.dual_clip", "loss.importance_cap", "data.epochs",
                  "loss.kl_clamp",
                  "student.rope_theta", "student.max_position",
                  "teacher.rope_theta", "teacher.max_position", "reference.rope_theta",
                  "reference.max_position", "sample.problems", "sample.slots",
                  "sample.temperature", "sample.max_response_tokens", "rollout.stop_on_repetition",
                  "rollout.top_k", "sample.top_k", "eval.top_k", "eval.slots",
                  "eval.max_response_tokens", "grading.processes",
                  "guard.beta_kl_floor", "guard.beta_kl_max", "guard.lambda_gold_floor",
                  "guard.lambda_gold_max", "profile.steps",
                  "checkpoint.deadline_minutes", "guard.skip_nonfinite", "guard.spike",
                  "guard.copies"):  # fmt: skip
        _range(flat, field, 0, math.inf)
    for field in ("rollout.top_p", "eval.top_p", "optim.beta1", "optim.beta2", "loss.clip_low",
                  "loss.discount",
                  "teacher.decay", "optim.warmup_fraction", "sample.top_p"):  # fmt: skip
        _range(flat, field, 0, 1)
    for field in ("optim.beta1", "optim.beta2"):
        if flat[field] == 1:  # Adam would divide 0 by 0
            raise _wrong(field, flat[field], "a number from 0 to below 1")
    for field in ("optim.learning_rate", "optim.grad_clip", "metrics.repetition_threshold",
                  "checkpoint.grace_seconds", "scoring.temperature",
                  "rollout.top_p", "eval.top_p", "sample.top_p"):  # fmt: skip
        if not 0 < flat[field] < math.inf:
            raise _wrong(field, flat[field], "a finite number above 0")
    _range(flat, "metrics.repetition_level", 1, 9)
    _range(flat, "grading.seconds", 0.1, 30)
    _check_mesh(flat)
    _range(flat, "metrics.repeated_ngram", 2, math.inf)
    for field, choices in (
        ("student.dtype", DTYPES), ("teacher.dtype", DTYPES), ("reference.dtype", DTYPES),
        ("loss.kl_estimator", ESTIMATORS), ("loss.direction", DIRECTIONS), ("loss.form", FORMS),
        ("loss.support", SUPPORTS), ("loss.support_weight", SUPPORT_WEIGHTS),
        ("loss.aggregation", AGGREGATIONS), ("loss.gold_aggregation", AGGREGATIONS[:2]),
        ("loss.truncated", ("keep", "mask", "tail")), ("loss.repeated", ("keep", "mask")),
        ("optim.schedule", ("constant", "linear", "cosine")), ("optim.remat", POLICIES),
        ("teacher.follow", ("frozen", "average", "live")), ("data.bad_rows", ("refuse", "skip")),
        ("scoring.special_tokens", ("remap", "mask", "keep")), ("metrics.repeated_tokens", RULES),
        ("guard.action", guard_limits.ACTIONS),
        ("guard.spike_action", ("warn", "skip")), ("eval.best", ("", *BEST)),
        ("grading.grader", GRADERS),
    ):  # fmt: skip
        _choice(flat, field, choices)
    _check_texts(flat)
    _check_date(config.data.date)
    _check_fallbacks(config.eval.fallbacks)
    if config.eval.best and not config.eval.data:
        raise ConfigError(
            f"eval.best={config.eval.best} needs evaluations, got eval.data=''; name held-out problems: "
            "--config.eval.data=FILE, or set --config.eval.best="
        )
    if config.eval.best == "matched" and not config.eval.match:
        raise _wrong("eval.match", "''", "a regular expression, for eval.best=matched")
    if not config.data.train:
        raise _wrong(
            "data.train", "''", "a file of problems (.jsonl, .json, .parquet), or tiny:train"
        )
    if not config.student.path:
        raise _wrong("student.path", "''", "the path of a Hugging Face folder")
    weights = ("pg_weight", "divergence_weight", "lambda_gold", "beta_kl")
    if not any(config.loss[name] for name in weights):
        raise ConfigError(
            f"loss.{', loss.'.join(weights)} are all 0, wanted one above 0: nothing would be "
            "trained; set --config.loss.pg_weight=1"
        )
    _check_loss(config)
    if config.teacher.follow != "frozen" and config.teacher.path != "student":
        raise ConfigError(
            f"teacher.follow={config.teacher.follow} is for a teacher that is the student, got "
            f"teacher.path={config.teacher.path!r}; set --config.teacher.path=student"
        )
    for field in ("data.prompt_template", "data.teacher_prompt_template"):
        if flat[field] != "same" and "{problem}" not in flat[field]:
            raise _wrong(field, repr(flat[field]), "a text that holds {problem}")
    if flat["data.prompt_template"] == "same" or flat["data.system_prompt"] == "same":
        raise ConfigError(
            "data.prompt_template and data.system_prompt are the student's own texts, got 'same'; "
            "set --config.data.prompt_template={problem}"
        )
    if not all(isinstance(text, str) and text for text in config.scoring.mask_first):
        raise _wrong(
            "scoring.mask_first", config.scoring.mask_first, 'texts, such as ("<","think")'
        )
    _check_metrics(config.metrics)
    depths = config.probe.depths
    whole = all(type(depth) is int and depth >= 1 for depth in depths)
    if not whole or len(set(depths)) < len(depths):
        raise _wrong("probe.depths", depths, "different whole numbers, at least 1, such as 64,256")
    if config.seed >= 2**32:
        raise _wrong("seed", config.seed, "a whole number below 2**32")
    try:
        re.compile(config.eval.match)
    except re.error as error:
        raise _wrong(
            "eval.match", repr(config.eval.match), f"a regular expression ({error})"
        ) from None
    if config.sample.temperature == 0 and config.sample.samples > 1:
        raise ConfigError(
            f"sample.samples={config.sample.samples} with sample.temperature=0 gives the same "
            "solution every time; set --config.sample.samples=1 or a temperature above 0"
        )
    if config.loss.pg_weight and config.rollout.temperature == 0:
        raise _wrong("rollout.temperature", 0, "a number above 0: greedy rollouts do not explore")
    prompts, updates = config.rollout.prompts_per_step, config.optim.updates_per_rollout
    if prompts % updates:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} does not divide into optim.updates_per_rollout="
            f"{updates} equal parts; set --config.rollout.prompts_per_step={-(-prompts // updates) * updates}"
        )
    _check_repetition(config.rollout)
    _check_guard(config)
    row = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.optim.microbatch_tokens < row:
        raise ConfigError(
            f"optim.microbatch_tokens={config.optim.microbatch_tokens} is less than one row of "
            f"{row} tokens (rollout.max_prompt_tokens + rollout.max_response_tokens); "
            f"set --config.optim.microbatch_tokens={row} or more"
        )


def validate_evaluation(config: ConfigDict) -> None:
    """Refuse what launch/evaluate.py cannot work with. Raises ConfigError as `validate` does."""
    _check_names(config.to_dict(), default().to_dict(), "")
    flat = flatten(config.to_dict())
    for field in ("eval.batch", "metrics.repetition_tail", "rollout.max_response_tokens"):
        _range(flat, field, 1, math.inf)
    for field in ("seed", "eval.problems", "eval.samples", "eval.temperature", "eval.top_k",
                  "eval.slots", "eval.max_response_tokens", "grading.processes", "student.rope_theta",
                  "student.max_position"):  # fmt: skip
        _range(flat, field, 0, math.inf)
    if config.seed >= 2**32:
        raise _wrong("seed", config.seed, "a whole number below 2**32")
    _range(flat, "eval.top_p", 0, 1)
    for field in ("eval.top_p", "metrics.repetition_threshold"):
        if not 0 < flat[field] < math.inf:
            raise _wrong(field, flat[field], "a finite number above 0")
    _range(flat, "metrics.repetition_level", 1, 9)
    _range(flat, "grading.seconds", 0.1, 30)
    _choice(flat, "student.dtype", DTYPES)
    _choice(flat, "data.bad_rows", ("refuse", "skip"))
    _choice(flat, "grading.grader", GRADERS)
    _check_mesh(flat)
    for field in ("data", "match", "best", "every"):
        if config.eval[field] != default().eval[field]:
            raise ConfigError(
                f"eval.{field}={config.eval[field]!r} is of evaluations in a training run; here problems "
                "are named by --config.eval.benchmarks=NAME=FILE (docs/evaluation.md)"
            )
    _check_texts(flat)
    _check_date(config.data.date)
    _check_fallbacks(config.eval.fallbacks)
    if "{problem}" not in config.data.prompt_template:
        raise _wrong(
            "data.prompt_template", repr(config.data.prompt_template), "a text that holds {problem}"
        )
    for told in ("{answer}", "{solution}"):
        if told in config.data.prompt_template:
            raise _wrong(
                "data.prompt_template", repr(config.data.prompt_template),
                f"a text without {told}: it would tell the model what it is asked for",
            )  # fmt: skip
    if config.eval.temperature == 0 and config.eval.samples > 1:
        raise ConfigError(
            f"eval.samples={config.eval.samples} with eval.temperature=0 gives the same answer every "
            "time; set --config.eval.samples=1 or a temperature above 0"
        )


def _check_mesh(flat: dict[str, Any]) -> None:
    for field in ("mesh.fsdp", "mesh.tensor"):
        _range(flat, field, 1, math.inf)
    if flat["mesh.data"] != -1:
        _range(flat, "mesh.data", 1, math.inf)
    for role in ROLES:
        _choice(flat, f"mesh.{role}", ("replicated", "sharded"))


def _check_fallbacks(names: tuple[str, ...]) -> None:
    if not all(name in FALLBACKS for name in names) or len(set(names)) < len(names):
        wanted = f"names among {', '.join(FALLBACKS)}, each once"
        raise _wrong("eval.fallbacks", repr(names), wanted)


def _check_loss(config: ConfigDict) -> None:
    """Rules between the fields of the loss: what would be ignored, or could not teach, is refused."""
    loss = config.loss
    by_teacher = loss.pg_weight and loss.teacher_coef
    if (by_teacher or loss.divergence_weight) and not config.teacher.path:
        raise _wrong(
            "teacher.path", "''",
            "a Hugging Face folder (loss.teacher_coef or loss.divergence_weight is above 0)",
        )  # fmt: skip
    for field in ("jsd_beta", "skew"):
        if not 0 < loss[field] < 1:
            raise _wrong(f"loss.{field}", loss[field], "a number between 0 and 1")
    if loss.pg_weight and not (loss.teacher_coef or loss.group_coef):
        raise ConfigError(
            "loss.teacher_coef and loss.group_coef are both 0, so every advantage is 0; set "
            "--config.loss.teacher_coef=1, or --config.loss.pg_weight=0"
        )
    if loss.pg_weight and loss.group_coef and config.rollout.samples_per_prompt < 2:
        raise ConfigError(
            "rollout.samples_per_prompt=1 with loss.group_coef above 0, wanted 2 or more: a rollout "
            "is compared with others of its prompt; set --config.rollout.samples_per_prompt=4"
        )
    if loss.dual_clip and loss.dual_clip <= 1:
        raise _wrong("loss.dual_clip", loss.dual_clip, "a number above 1, or 0 for none")
    if loss.advantage in ("divergence", "top_k", "topk", "kl"):
        raise ConfigError(
            f"loss.advantage={loss.advantage} would be the same for every token that could have been "
            "sampled, and such an advantage teaches nothing: its expected gradient is 0; set "
            "--config.loss.advantage=support, or --config.loss.pg_weight=0 "
            "--config.loss.divergence_weight=1 for the divergence's own gradient"
        )
    _choice(flatten(config.to_dict()), "loss.advantage", ("sampled", "support"))
    on_support = bool(by_teacher) and loss.advantage == "support"
    if on_support and loss.support == "full":
        raise ConfigError(
            "loss.advantage=support with loss.support=full, wanted a support of top_k ids; set "
            "--config.loss.support=student, or --config.loss.pg_weight=0 "
            "--config.loss.divergence_weight=1 for the whole vocabulary"
        )
    for field, (why, change) in unused(config).items():
        if loss[field] != (usual := default().loss[field]):
            raise ConfigError(
                f"loss.{field}={loss[field]} has no effect: {why}; leave it at {usual}, or set {change}"
            )
    if loss.form == "stop_gradient" and loss.direction != "reverse":
        raise ConfigError(
            f"loss.form=stop_gradient with loss.direction={loss.direction}, wanted reverse: elsewhere "
            "it would stop the whole gradient; set --config.loss.direction=reverse"
        )
    single = loss.top_k == 1 and loss.support in ("student", "teacher", "intersection")
    if loss.divergence_weight and single and loss.form == "renormalised":
        raise ConfigError(
            "loss.top_k=1 with loss.form=renormalised: over one id every renormalised distribution is "
            "1, so the divergence is 0 and teaches nothing; set --config.loss.top_k=16"
        )


def _check_repetition(rollout: ConfigDict) -> None:
    last, period = rollout.stop_on_repetition, rollout.repetition_period
    if last and not period <= last < rollout.max_response_tokens:
        raise _wrong(
            "rollout.stop_on_repetition", last,
            f"0, or a number from rollout.repetition_period={period}, so that a cycle came round once, "
            f"to below rollout.max_response_tokens={rollout.max_response_tokens}",
        )  # fmt: skip


def _check_guard(config: ConfigDict) -> None:
    section, loss = config.guard, config.loss
    if 0 < section.spike <= 1:
        raise _wrong("guard.spike", section.spike, "a number above 1, or 0 for none")
    flat = flatten({"guard": section.to_dict()})
    _range(flat, "guard.false_alarm_every", 10, math.inf)
    _range(flat, "guard.memory", 2 * guard_limits.LAG, math.inf)
    _range(flat, "guard.patience", guard_limits.LAG, math.inf)
    _range(flat, "guard.factor", 1.1, math.inf)
    if section.action == "off":
        return
    if not (loss.pg_weight or loss.divergence_weight or loss.beta_kl):
        raise ConfigError(
            f"guard.action={section.action!r} watches rollouts, and this loss makes none "
            "(loss.pg_weight, loss.divergence_weight and loss.beta_kl are 0); set --config.guard.action=off"
        )
    if section.action not in ("strengthen", "rollback"):
        return
    for name in ("beta_kl", "lambda_gold"):
        first, most = loss[name] or section[f"{name}_floor"], section[f"{name}_max"]
        if most and not 0 < first <= most:
            raise _wrong(
                f"guard.{name}_max", most,
                f"0, or at least {first}, which loss.{name} or guard.{name}_floor begins with (above 0)",
            )  # fmt: skip
    if not (guard_limits.may_raise_beta_kl(config) or guard_limits.may_raise_lambda_gold(config)):
        raise ConfigError(
            f"guard.action={section.action!r} has nothing to raise: guard.beta_kl_max and "
            "guard.lambda_gold_max are not above loss.beta_kl and loss.lambda_gold; "
            "set --config.guard.beta_kl_max=1.0"
        )
    every, keep = config.checkpoint.every, config.checkpoint.keep
    if section.action == "rollback" and every * (keep - 1) < guard_limits.REACH:
        wanted = -(-guard_limits.REACH // every) + 1 if every else 2
        raise ConfigError(
            f"guard.action='rollback' wants a checkpoint that is {guard_limits.REACH} steps old, got "
            f"checkpoint.keep={keep} of checkpoint.every={every} steps; set --config.checkpoint.keep={wanted}"
            + ("" if every else f" --config.checkpoint.every={guard_limits.REACH}")
        )


def _check_metrics(section: ConfigDict) -> None:
    """The two tuples; either may be empty."""
    places, words = section.positions, section.hedging
    whole = isinstance(places, tuple) and all(type(n) is int and n > 0 for n in places)
    if not whole or list(places) != sorted(set(places)):
        wanted = "whole numbers above 0, each above the one before, such as (256,512)"
        raise _wrong("metrics.positions", repr(places), wanted)
    if not isinstance(words, tuple) or not all(
        isinstance(word, str) and re.fullmatch(r"[^\W\d_]+", word) for word in words
    ):
        wanted = 'words of letters, such as ("wait","but")'
        raise _wrong("metrics.hedging", repr(words), wanted)


def _check_names(got: dict, known: dict, prefix: str) -> None:
    for name, value in got.items():
        if name not in known:
            fields = list(flatten(default().to_dict()))
            raise ConfigError(
                f"config.{prefix}{name} is not a field; {suggest(f'{prefix}{name}', fields)}"
            )
        if isinstance(known[name], dict) != isinstance(value, dict):
            raise ConfigError(
                f"config.{prefix}{name} is {value!r}, wanted the kind of {known[name]!r}"
            )
        if isinstance(value, dict):
            _check_names(value, known[name], f"{prefix}{name}.")
        elif isinstance(known[name], bool | int | float):
            _check_kind(f"{prefix}{name}", value, known[name])
    for name in known:
        if name not in got:
            raise ConfigError(
                f"config.{prefix}{name} is missing; start from opd_jax.config.default()"
            )


def _check_date(date: str) -> None:
    try:
        fits = not date or str(datetime.date.fromisoformat(date)) == date
    except ValueError:
        fits = False
    if not fits:
        raise _wrong("data.date", repr(date), "a day as YYYY-MM-DD, such as 2026-01-31, or none")


def _check_texts(flat: dict[str, Any]) -> None:
    """The texts and tuples; numbers are looked at with the names, choices by what they may be."""
    for field, known in flatten(default().to_dict()).items():
        if isinstance(known, str | tuple):
            _check_kind(field, flat[field], known)
