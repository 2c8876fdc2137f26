"""Fields of the loss that the other fields leave without effect, so that validate.py can refuse them."""

from typing import Any

from opd_jax.config import guard_limits
from opd_jax.config.loss_fields import OUTCOME_NUMBERS, SHAPE_NUMBERS

# Numbers of a token weight: the rules that read them.
_READ_BY = {
    "strength": ("iw", "step", "fire"), "threshold": ("prune",), "drop": ("prune",),
    "least": ("prune", "selectkd"), "keep": ("tip", "ta", "fire"), "quantile": ("tip", "ta"),
    "top_k": ("ta", "selectkd"), "window": ("step",),
}  # fmt: skip


def unused(config: Any) -> dict[str, tuple[str, str]]:
    """Return {field of the section `loss`: (why nothing reads it, the option that would change that)}.

    Weights of whole terms (pg_weight, divergence_weight, lambda_gold, golden_divergence, beta_kl) are always
    read.
    """
    loss = config.loss
    surrogate, divergence = bool(loss.pg_weight), bool(loss.divergence_weight)
    by_teacher, by_group = (
        surrogate and bool(loss.teacher_coef),
        surrogate and bool(loss.group_coef),
    )
    on_support = by_teacher and loss.advantage == "support"
    of_sampled = by_group or (by_teacher and not on_support)
    reference = bool(loss.beta_kl) or guard_limits.may_raise_beta_kl(config)
    soft = bool(loss.golden_divergence)
    golden = soft or bool(loss.lambda_gold) or guard_limits.may_raise_lambda_gold(config)
    directions = [loss.direction] * divergence + [loss.golden_direction] * soft
    named = [f"loss.direction={loss.direction}"] * divergence
    named += [f"loss.golden_direction={loss.golden_direction}"] * soft
    rollouts = surrogate or divergence or reference
    no_surrogate = "loss.pg_weight=0", "--config.loss.pg_weight=1"
    no_divergence = "loss.divergence_weight=0", "--config.loss.divergence_weight=1"
    no_support = (
        f"loss.divergence_weight={loss.divergence_weight:g} and loss.advantage={loss.advantage}, so "
        "nothing is summed over ids of a support",
        "--config.loss.divergence_weight=1 --config.loss.pg_weight=0",
    )
    whole = (
        "loss.support=full has all ids, over which all forms agree",
        "--config.loss.support=student",
    )
    ids_alone = (
        "it applies to the sampled token's advantage, and loss.advantage=support sums over ids",
        "--config.loss.advantage=sampled",
    )
    no_teacher = (
        f"loss.pg_weight={loss.pg_weight:g} and loss.teacher_coef={loss.teacher_coef:g}",
        "--config.loss.pg_weight=1 --config.loss.teacher_coef=1",
    )
    no_reference = "loss.beta_kl=0", "--config.loss.beta_kl=0.01"
    evidence = "--config.loss.evidence_share=0.5 --config.loss.group_coef=1"
    on_teacher = loss.token_weight_on == "teacher"
    weighted, gated = loss.token_weight != "none", loss.rollout_gate != "none"
    by_evidence = by_group and bool(loss.evidence_share)
    factors = by_teacher or ((divergence or by_evidence) and not on_teacher)
    no_scores = (
        "no term of this loss asks a teacher", "--config.loss.pg_weight=1 --config.loss.teacher_coef=1"
    )  # fmt: skip
    no_factors = (
        f"loss.pg_weight={loss.pg_weight:g}, loss.teacher_coef={loss.teacher_coef:g} and "
        f"loss.divergence_weight={loss.divergence_weight:g} have no term of the teacher that "
        f"loss.token_weight_on={loss.token_weight_on} would weigh",
        "--config.loss.pg_weight=1 --config.loss.teacher_coef=1",
    )
    table = [
        (("clip_low", "clip_high", "dual_clip", "group_coef"), surrogate, no_surrogate),
        # A coefficient of 0 asks for nothing, so nothing is lost.
        (("teacher_coef",), surrogate or not loss.teacher_coef, no_surrogate),
        (
            ("group_normalise",), by_group,
            ("there is no group-relative advantage", "--config.loss.group_coef=1"),
        ),
        (("advantage",), by_teacher, no_teacher),
        (("advantage_clamp", "discount"), by_teacher, no_teacher),
        (("advantage_clamp", "discount"), not on_support, ids_alone),
        (("advantage_shape", "extrapolation"), by_teacher, no_teacher),
        (("advantage_shape", "extrapolation"), not on_support, ids_alone),
        (
            ("advantage_shape_value",), loss.advantage_shape in SHAPE_NUMBERS,
            (
                f"loss.advantage_shape={loss.advantage_shape} has no number",
                "--config.loss.advantage_shape=" + " or ".join(SHAPE_NUMBERS),
            ),
        ),
        (
            ("extrapolation",), loss.advantage_shape != "unlikely",
            (
                "loss.advantage_shape=unlikely does not read the teacher",
                "--config.loss.advantage_shape=log_ratio",
            ),
        ),
        (
            ("evidence_share",), by_group,
            (
                "there is no group-relative reward whose size it could change",
                "--config.loss.group_coef=1",
            ),
        ),
        (
            ("evidence_steps", "evidence_clip", "evidence_away", "evidence_correct_only"),
            by_evidence,
            ("loss.evidence_share=0, or there is no group-relative advantage", evidence),
        ),
        (("outcome",), by_teacher, no_teacher),
        (("outcome",), not on_support, ids_alone),
        (
            ("outcome_value",), loss.outcome in OUTCOME_NUMBERS,
            (
                f"loss.outcome={loss.outcome} has no number",
                "--config.loss.outcome=" + " or ".join(OUTCOME_NUMBERS),
            ),
        ),
        (("importance_cap",), surrogate, no_surrogate),
        (("importance_cap",), of_sampled or not surrogate, ids_alone),
        (
            ("support_weight",), on_support,
            ("there is no advantage over a support", "--config.loss.advantage=support"),
        ),
        (("support", "top_k"), on_support or divergence, no_support),
        (("top_k",), loss.support != "full", whole),
        (
            ("direction", "form", "gate", "gate_threshold", "span_events"), divergence, no_divergence,
        ),
        (
            ("span_events",), config.scoring.compare == "spans",
            (
                f"scoring.compare={config.scoring.compare} need not compare by spans of text",
                "--config.scoring.compare=spans",
            ),
        ),
        (
            ("direction",), loss.span_events != "sorted",
            (
                "loss.span_events=sorted compares sorted probabilities, which has no direction",
                "--config.loss.span_events=matched",
            ),
        ),
        (("jsd_beta", "skew", "reverse_share"), divergence or soft, no_divergence),
        (
            ("reverse_share",), "mixture" in directions,
            (", ".join(named), "--config.loss.direction=mixture"),
        ),
        (
            ("golden_direction", "golden_support", "golden_top_k", "golden_form", "golden_steps"),
            soft, ("loss.golden_divergence=0", "--config.loss.golden_divergence=1"),
        ),
        (
            ("golden_top_k", "golden_form"), loss.golden_support != "full",
            (
                "loss.golden_support=full has all ids, over which all forms agree",
                "--config.loss.golden_support=teacher",
            ),
        ),
        (
            ("gate_threshold",), loss.gate in ("entropy", "advantage"),
            (f"loss.gate={loss.gate} has no threshold", "--config.loss.gate=entropy"),
        ),
        (("token_weight",), factors, no_factors),
        (("rollout_gate",), by_teacher if on_teacher else rollouts, no_factors),
        (
            ("token_weight_on",), weighted or gated,
            ("loss.token_weight=none and loss.rollout_gate=none", "--config.loss.token_weight=iw"),
        ),
        *(
            (
                (f"token_weight_{number}",), loss.token_weight in rules,
                (f"loss.token_weight={loss.token_weight} does not read it",
                 f"--config.loss.token_weight={rules[0]}"),
            )
            for number, rules in _READ_BY.items()
        ),
        (
            ("rollout_gate_margin",), loss.rollout_gate == "agreement",
            (f"loss.rollout_gate={loss.rollout_gate}", "--config.loss.rollout_gate=agreement"),
        ),
        (
            ("rollout_gate_reward",),
            (loss.rollout_gate == "correct" or loss.outcome != "none")
            and bool(config.reward.function or config.reward.column),
            (
                f"loss.rollout_gate={loss.rollout_gate} and loss.outcome={loss.outcome}, or the reward is a "
                "verdict, 0 or 1",
                "--config.loss.rollout_gate=correct with --config.reward.function",
            ),
        ),
        (("form",), loss.support != "full", whole),
        (
            ("jsd_beta",), "jsd" in directions,
            (", ".join(named), "--config.loss.direction=jsd"),
        ),
        (
            ("skew",), any(direction.startswith("skewed") for direction in directions),
            (", ".join(named), "--config.loss.direction=skewed_reverse"),
        ),
        (("kl_estimator", "kl_clamp"), reference, no_reference),
        (
            ("kl_clamp",), loss.kl_estimator == "k3",
            (f"loss.kl_estimator={loss.kl_estimator}", "--config.loss.kl_estimator=k3"),
        ),
        (
            ("aggregation", "truncated", "truncated_tail", "repeated"), rollouts,
            ("no term is taken on rollouts", "--config.loss.pg_weight=1"),
        ),
        (
            ("low_kl_window",), rollouts and (by_teacher or divergence or by_evidence or soft),
            no_scores,
        ),
        *(
            (
                (f"low_kl_{number}",), bool(loss.low_kl_window),
                ("loss.low_kl_window=0", "--config.loss.low_kl_window=64"),
            )
            for number in ("run", "share", "history", "rollouts", "steps")
        ),
        (
            ("truncated_tail",), loss.truncated == "tail",
            (f"loss.truncated={loss.truncated}", "--config.loss.truncated=tail"),
        ),
        (
            ("gold_aggregation",), golden,
            ("no term is taken on golden solutions", "--config.loss.lambda_gold=1"),
        ),
    ]  # fmt: skip
    found: dict[str, tuple[str, str]] = {}
    for fields, read, why in table:
        found |= {field: why for field in fields if not read and field not in found}
    return found
