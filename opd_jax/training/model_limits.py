"""Check the lengths and the top-k sets of the config against the models' positions and shared ids."""

from ml_collections import ConfigDict

from opd_jax import data, models
from opd_jax.errors import ConfigError
from opd_jax.training.terms import Terms


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
        ("scoring.overlap_top_k", config.scoring.overlap_top_k if teacher else 0),
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
