"""Rules between the fields of the loss: what is impossible together, would be ignored or could not teach."""

from ml_collections import ConfigDict

from opd_jax.config.fields import FIELDS
from opd_jax.config.loss_fields import OUTCOME_NUMBERS, SHAPE_NUMBERS
from opd_jax.config.no_effect import unused
from opd_jax.config.schema import wrong
from opd_jax.errors import ConfigError


def asks_teacher(loss: ConfigDict) -> bool:
    """Return whether the surrogate's advantage reads the teacher."""
    by_evidence = loss.group_coef and loss.evidence_share
    return bool(loss.pg_weight and (loss.teacher_coef or by_evidence))


def check_loss(config: ConfigDict) -> None:
    """Rules between the fields of the loss: what would be ignored, or could not teach, is refused."""
    loss = config.loss
    by_teacher = loss.pg_weight and loss.teacher_coef
    divergences = loss.divergence_weight or loss.golden_divergence
    if (asks_teacher(loss) or divergences) and not config.teacher.path:
        raise wrong(
            "teacher.path", "''",
            "a Hugging Face folder (loss.teacher_coef, loss.divergence_weight, loss.golden_divergence "
            "or loss.evidence_share is above 0)",
        )  # fmt: skip
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
    on_support = bool(by_teacher) and loss.advantage == "support"
    if on_support and loss.support == "full":
        raise ConfigError(
            "loss.advantage=support with loss.support=full, wanted a support of top_k ids; set "
            "--config.loss.support=student, or --config.loss.pg_weight=0 "
            "--config.loss.divergence_weight=1 for the whole vocabulary"
        )
    for field, (why, change) in unused(config).items():
        if loss[field] != (usual := FIELDS[f"loss.{field}"].default):
            raise ConfigError(
                f"loss.{field}={loss[field]} has no effect: {why}; leave it at {usual}, or set {change}"
            )
    _check_shape(loss)
    if loss.low_kl_window and loss.low_kl_rollouts > loss.low_kl_history:
        raise ConfigError(
            f"loss.low_kl_rollouts={loss.low_kl_rollouts} is more than loss.low_kl_history="
            f"{loss.low_kl_history}, so that the first cut would never come; set "
            f"--config.loss.low_kl_rollouts={loss.low_kl_history} or less"
        )
    _check_outcome(config)
    _check_divergence(loss, "", present=bool(loss.divergence_weight))
    _check_divergence(loss, "golden_", present=bool(loss.golden_divergence))


def _check_divergence(loss: ConfigDict, prefix: str, *, present: bool) -> None:
    """Rules between direction, form and support of the divergence whose fields begin with `prefix`."""
    direction, form, support, k = (
        loss[f"{prefix}{name}"] for name in ("direction", "form", "support", "top_k")
    )
    field = f"loss.{prefix}"
    if form == "teacher_renormalised" and direction != "forward":
        raise ConfigError(
            f"{field}form=teacher_renormalised with {field}direction={direction}, wanted forward: only "
            f"there it is known (2603.07079); set --config.{field}direction=forward, or "
            f"--config.{field}form=renormalised for another direction"
        )
    if form == "stop_gradient" and direction != "reverse":
        raise ConfigError(
            f"{field}form=stop_gradient with {field}direction={direction}, wanted reverse: elsewhere "
            f"it would stop the whole gradient; set --config.{field}direction=reverse"
        )
    single = k == 1 and support in ("student", "teacher", "intersection")
    if present and single and form == "renormalised":
        raise ConfigError(
            f"{field}top_k=1 with {field}form=renormalised: over one id every renormalised distribution "
            f"is 1, so the divergence is 0 and teaches nothing; set --config.{field}top_k=16"
        )


def _check_shape(loss: ConfigDict) -> None:
    """Rules about the shape of the teacher's advantage."""
    shape, value = loss.advantage_shape, loss.advantage_shape_value
    numbers = SHAPE_NUMBERS.get(shape)
    if numbers is not None and not numbers.holds(value):
        example = {"power": 1, "floor": 0.2, "skew": 0.1, "unlikely": 0.1}[shape]
        raise ConfigError(
            f"loss.advantage_shape_value={value} with loss.advantage_shape={shape}, wanted "
            f"{numbers.wanted(0.0)}; set --config.loss.advantage_shape_value={example}"
        )
    if shape == "baseline" and loss.discount:
        raise ConfigError(
            f"loss.advantage_shape=baseline with loss.discount={loss.discount}: after the baseline every "
            "later log-ratio has mean 0 at its own prefix, so a return of them adds only noise; set "
            "--config.loss.discount=0, or --config.loss.advantage_shape=log_ratio"
        )
    if loss.extrapolation != 1 and shape in ("baseline", "power", "skew"):
        raise ConfigError(
            f"loss.extrapolation={loss.extrapolation} with loss.advantage_shape={shape}, wanted a shape "
            "of the log-ratio alone: an extrapolated teacher is not a normalised distribution; set "
            "--config.loss.advantage_shape=log_ratio, or --config.loss.extrapolation=1"
        )


def _check_outcome(config: ConfigDict) -> None:
    """Rules about the outcome of rollouts in the teacher's advantage."""
    rule, value = config.loss.outcome, config.loss.outcome_value
    numbers = OUTCOME_NUMBERS.get(rule)
    if numbers is not None and not numbers.holds(value):
        raise ConfigError(
            f"loss.outcome_value={value} with loss.outcome={rule}, wanted {numbers.wanted(0.0)}; set "
            "--config.loss.outcome_value=1"
        )
    if rule == "margin" and config.rollout.samples_per_prompt < 2:
        raise ConfigError(
            "rollout.samples_per_prompt=1 with loss.outcome=margin, wanted 2 or more: correct rollouts "
            "are compared with others of their prompt; set --config.rollout.samples_per_prompt=4"
        )


def check_gates(config: ConfigDict) -> None:
    """Rules about gates of tokens and of rollouts."""
    loss = config.loss
    if loss.gate != "none" and loss.direction in ("reverse", "skewed_reverse"):
        raise ConfigError(
            f"loss.gate={loss.gate} with loss.direction={loss.direction}, which has no forward term; a "
            "gate selects the tokens that have one; set --config.loss.direction=forward"
        )
    without = ("student", "intersection", "symmetric_difference")
    if loss.gate != "none" and loss.support in without:
        raise ConfigError(
            f"loss.gate={loss.gate} with loss.support={loss.support}, which leaves out ids that the teacher "
            "prefers, so it has no forward term; set --config.loss.support=teacher, union or full"
        )
    if loss.gate == "entropy" and loss.gate_threshold <= 0:
        raise ConfigError(
            f"loss.gate_threshold={loss.gate_threshold:g} with loss.gate=entropy, wanted nats above 0: no "
            "entropy is below it; set --config.loss.gate_threshold=0.8, or --config.loss.gate=none"
        )
    if loss.gate == "advantage" and loss.gate_threshold >= 1:
        raise ConfigError(
            f"loss.gate_threshold={loss.gate_threshold:g} with loss.gate=advantage, wanted a difference of "
            "probabilities below 1: at 1 the gate is open everywhere; set --config.loss.gate_threshold=0, "
            "or --config.loss.gate=none --config.loss.pg_weight=0 for the divergence alone"
        )
    if loss.gate == "advantage" and loss.gate_threshold == -1:
        raise ConfigError(
            "loss.gate_threshold=-1 with loss.gate=advantage closes the gate everywhere; set "
            "--config.loss.gate_threshold=0, or --config.loss.divergence_weight=0 --config.loss.gate=none"
        )
    if loss.rollout_gate != "agreement":
        return
    if not asks_teacher(loss) and not loss.divergence_weight:
        raise ConfigError(
            "loss.rollout_gate=agreement compares the teacher with the reward, and no term of this loss "
            "asks a teacher; set --config.loss.teacher_coef=1, or --config.loss.rollout_gate=correct"
        )
    if config.rollout.samples_per_prompt < 2:
        raise ConfigError(
            "rollout.samples_per_prompt=1 with loss.rollout_gate=agreement, wanted 2 or more: a rollout "
            "is compared with others of its prompt; set --config.rollout.samples_per_prompt=4"
        )
