"""Check the lengths and the top-k sets of the config against the models' positions and shared ids."""

import math

from ml_collections import ConfigDict

from opd_jax import data, models
from opd_jax.errors import ConfigError
from opd_jax.training.terms import Terms


def teacher_response(config: ConfigDict, *, spans: bool) -> int:
    """Return the most tokens of a response in the teacher's rows, more where it has another tokenizer."""
    most = config.rollout.max_response_tokens
    return math.ceil(most * config.scoring.span_room) if spans else most


def check_spans(config: ConfigDict, terms: Terms) -> None:
    """Raise ConfigError where the loss reads more of the teacher than it has at spans of text.

    With another tokenizer the teacher has no distribution over the student's vocabulary, and no log-prob of
    a single token. A divergence on rollouts is one of `losses.SPAN_EVENTS`.
    """
    loss, alone = config.loss, "student and teacher are compared by spans of text (docs/spans.md)"
    over_ids = "which compares distributions over one vocabulary"
    one_token = "which needs both models' log-prob of a single token"
    for field, value, why, change in (
        ("loss.support", terms.divergence_weight and loss.support != "full" and loss.support,
         "which has top-k ids of one vocabulary", "--config.loss.support=full"),
        ("loss.gate", terms.gated and loss.gate, one_token, "--config.loss.gate=none"),
        ("loss.golden_divergence", terms.golden_divergence, over_ids, "--config.loss.golden_divergence=0"),
        ("loss.low_kl_window", loss.low_kl_window, "which reads a KL over one vocabulary",
         "--config.loss.low_kl_window=0"),
        ("loss.outcome", terms.outcome == "route" and "route", one_token, "--config.loss.outcome=none"),
        ("loss.advantage", terms.on_support and loss.advantage, over_ids, "--config.loss.advantage=sampled"),
        ("loss.advantage_shape", loss.advantage_shape == "baseline" and "baseline",
         "whose baseline is a KL over one vocabulary", "--config.loss.advantage_shape=log_ratio"),
        ("loss.discount", terms.discount, "which counts tokens, not spans", "--config.loss.discount=0"),
        ("loss.extrapolation", terms.scores_reference and loss.extrapolation, one_token,
         "--config.loss.extrapolation=1"),
        ("loss.evidence_share", terms.group_coef and terms.evidence_share, one_token,
         "--config.loss.evidence_share=0"),
        ("loss.token_weight", terms.token_rule != "none" and terms.token_rule, one_token,
         "--config.loss.token_weight=none"),
        ("loss.rollout_gate", terms.rollout_gate == "agreement" and "agreement", one_token,
         "--config.loss.rollout_gate=correct"),
        ("log.variants", config.log.variants, "which compares advantages of single tokens",
         "--config.log.variants=0"),
        ("scoring.special_tokens", config.scoring.special_tokens != "remap" and
         config.scoring.special_tokens, "which concerns ids that both models share",
         "--config.scoring.special_tokens=remap"),
        ("replay.path", config.replay.path, "which has the teacher's log-probs of the student's own tokens",
         "--config.replay.path="),
    ):  # fmt: skip
        if value:
            raise ConfigError(f"{field}={value}, {why}, but {alone}; set {change}")


def check_rollouts(
    config: ConfigDict,
    terms: Terms,
    student: models.ModelConfig,
    teacher: models.ModelConfig | None,
    reference: models.ModelConfig,
    alignment: data.Alignment,
) -> None:
    """Raise ConfigError where rollouts exceed a model's positions, or a top-k set the shared ids."""
    scored = int(alignment.scored.sum())
    for field, k in (
        (
            "scoring.overlap_top_k",
            config.scoring.overlap_top_k if teacher and alignment.teacher is None else 0,
        ),
        ("loss.top_k", config.loss.top_k if terms.scored_support else 0),
        ("loss.golden_top_k", config.loss.golden_top_k if terms.golden_scored_support else 0),
    ):
        if k > scored:
            raise ConfigError(
                f"{field}={k} is more than the {scored} ids that the models share; "
                f"set --config.{field}={scored}"
            )
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    roles = {"student": student, "teacher": teacher}
    if terms.needs_reference and config.reference.path:
        roles["reference"] = reference
    for role, model in roles.items():
        if role == "teacher" and alignment.teacher is not None:
            continue  # its rows have lengths of their own, which each problem is checked against
        if model is not None and width > model.max_position:
            room = max(model.max_position - config.rollout.max_prompt_tokens, 1)
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {width} is more than "
                f"the {role}'s {model.max_position} positions; "
                f"set --config.rollout.max_response_tokens={room} or less, or extend the model: "
                f"--config.{role}.max_position={width} (with a larger --config.{role}.rope_theta "
                "unless it was trained for that length)"
            )


def check_held_out(
    config: ConfigDict,
    student: models.ModelConfig,
    teacher: models.ModelConfig | None,
    *,
    teacher_prompt: int,
) -> None:
    """Raise ConfigError where held-out answers, which may be longer than rollouts, exceed the positions.

    `teacher_prompt` is the length of the teacher's longest prompt.
    """
    budget = config.eval.max_response_tokens
    if not budget:
        return
    evaluated = {"student": (student, config.rollout.max_prompt_tokens)}
    if teacher is not None and config.eval.teacher:
        evaluated["teacher"] = (teacher, teacher_prompt)
    for role, (model, prompt) in evaluated.items():
        room = model.max_position - prompt
        if budget > room:
            raise ConfigError(
                f"eval.max_response_tokens={budget} and prompts of {prompt} tokens are more than "
                f"the {role}'s {model.max_position} positions; "
                f"set --config.eval.max_response_tokens={room} or less"
            )
