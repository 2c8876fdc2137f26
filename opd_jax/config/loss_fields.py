"""The fields of the section `loss`, a part of the table in fields.py."""

# fmt: off
from opd_jax.config.record import (
    ABOVE_ZERO,
    COUNT,
    FROM_ZERO,
    SHARE,
    Choices,
    Field,
    Range,
    Section,
)

# Names that other programs and papers have for an advantage that is the same for every sampled token.
CONSTANT = ("divergence", "top_k", "topk", "kl")
TEACHES_NOTHING = (
    "would be the same for every token that could have been sampled, and such an advantage teaches nothing: "
    "its expected gradient is 0; set --config.loss.advantage=support, or --config.loss.pg_weight=0 "
    "--config.loss.divergence_weight=1 for the divergence's own gradient"
)
# The number of an advantage's shape; shapes that are not here have none (validate.py, no_effect.py).
SHAPE_NUMBERS = {
    "power": ABOVE_ZERO, "floor": Range(above=0, below=0.5), "skew": Range(above=0, below=1),
    "unlikely": Range(above=0, below=1),
}
# The number of a rule by outcomes, likewise.
OUTCOME_NUMBERS = {"margin": FROM_ZERO, "route": ABOVE_ZERO}
ADVANTAGES = Choices(("sampled", "support"), refused=dict.fromkeys(CONSTANT, TEACHES_NOTHING))

LOSS = Section("loss", "The loss: a method is a set of these numbers (docs/objectives.md).", (
    Field("pg_weight", 1.0, FROM_ZERO, "Weight of the clipped policy-gradient surrogate."),
    Field("teacher_coef", 1.0, FROM_ZERO, "Weight of log q - log p (teacher, student) in the advantage."),
    Field("group_coef", 0.0, FROM_ZERO,
          "Weight of the group-relative verifiable reward in the advantage (GRPO)."),
    Field("group_normalise", True, None,
          "Whether that reward is divided by its group's standard deviation; False is Dr.GRPO."),
    Field("advantage", "sampled", ADVANTAGES,
          "Ids that have the teacher's advantage: the sampled token, or every id of the support."),
    Field("advantage_clamp", 0.0, FROM_ZERO,
          "Bound of the teacher's log-ratio, on both sides; 0 = none (2603.25562: 5)."),
    Field("discount", 0.0, SHARE,
          "Discount of the teacher's later log-ratios; 0 = a token's own alone, 1 = the whole return."),
    Field("advantage_shape", "log_ratio", Choices("opd_jax.losses:ADVANTAGE_SHAPES"),
          "Function of the two log-probs that is the teacher's advantage; log_ratio is log q - log p "
          "(docs/objectives.md)."),
    Field("advantage_shape_value", 0.0, FROM_ZERO,
          "Number of that shape: exponent of power, share of floor, a of skew, probability of unlikely."),
    Field("extrapolation", 1.0, ABOVE_ZERO,
          "The teacher's log-prob is moved away from the reference by this factor: 1 = not at all, "
          "above 1 past the teacher (2602.12125: 1.25), below 1 between the two."),
    Field("evidence_share", 0.0, SHARE,
          "Share of the teacher's log-ratio in the size of the group-relative advantage (RLSD); "
          "0 = none."),
    Field("evidence_steps", 0, FROM_ZERO, "Steps over which that share falls to 0; 0 = it stays."),
    Field("evidence_clip", 0.2, Range(above=0, below=1),
          "The probability ratio of teacher and student is clipped to 1 - this and 1 + this there."),
    Field("evidence_away", False, None,
          "Whether the ratio is turned round, so that a token counts more if the teacher likes it less."),
    Field("evidence_correct_only", False, None,
          "Whether only rollouts with a positive group advantage are weighted so."),
    Field("outcome", "none", Choices("opd_jax.losses:OUTCOMES"),
          "How a rollout's outcome changes the teacher's advantage: margin shifts correct and other rollouts "
          "of a prompt apart (2605.03677); route keeps it for incorrect rollouts and gives correct ones 1, "
          "both weighted by perplexity (2604.10688)."),
    Field("outcome_value", 0.0, FROM_ZERO,
          "margin: the least difference of mean advantages (2605.03677: 0.4); route: the temperature of the "
          "weights (2604.10688: 1)."),
    Field("support_weight", "student", Choices("opd_jax.losses:SUPPORT_WEIGHTS"),
          "Distribution that weights the ids of the support in the advantage."),
    Field("clip_low", 0.2, SHARE, "The ratio is clipped at 1 - clip_low."),
    Field("clip_high", 0.2, FROM_ZERO, "The ratio is clipped at 1 + clip_high."),
    Field("dual_clip", 0.0, Range(above=1, also=(0,)),
          "Bound of the loss of a token with negative advantage, as a multiple of it; 0 = none "
          "(verl: 3)."),
    Field("importance_cap", 0.0, FROM_ZERO,
          "Cap on the per-token importance weight p_scorer / p_sampler (TIS); 0 = off, 2 is common."),
    Field("divergence_weight", 0.0, FROM_ZERO, "Weight of the divergence D(student, teacher)."),
    Field("support", "full", Choices("opd_jax.scoring.topk:SUPPORTS"),
          "Ids that the divergence or the advantage is taken over: the whole vocabulary, or a set "
          "made of the top-k ids of student and teacher."),
    Field("top_k", 16, COUNT, "k of that set."),
    Field("direction", "reverse", Choices("opd_jax.losses:DIRECTIONS"),
          "Divergence: KL(student || teacher) is reverse, KL(teacher || student) forward."),
    Field("form", "raw", Choices("opd_jax.losses:FORMS"),
          "What is done about the mass outside the support (docs/objectives.md)."),
    Field("jsd_beta", 0.5, Range(above=0, below=1), "b of the generalised Jensen-Shannon divergence."),
    Field("skew", 0.1, Range(above=0, below=1), "a of the skewed divergences (2402.03898)."),
    Field("reverse_share", 0.5, SHARE, "Share of KL(student || teacher) in the mixture; the rest is "
          "KL(teacher || student)."),
    Field("span_events", "candidates", Choices("opd_jax.losses.span_divergence:SPAN_EVENTS"),
          "What the divergence compares at a span of text, where student and teacher have different "
          "tokenizers (docs/spans.md): the shared ids and the span itself (candidates, 2605.07711), or the "
          "distributions at its last token, by sorted probabilities (sorted, ULD) or by shared ids where "
          "there are some and sorted elsewhere (matched, GOLD)."),
    Field("gate", "none", Choices("opd_jax.losses:GATES"),
          "Tokens that have the divergence: all, those whose teacher is unsure (entropy, beside the "
          "surrogate), or, instead of the surrogate, those that the teacher likes less (advantage) or "
          "would not accept (acceptance)."),
    Field("gate_threshold", 0.0, Range(-1),
          "Least entropy of the teacher in nats (2603.07079: 0.8), or the largest q - p in probability "
          "of a token that has the divergence (2605.06387: 0)."),
    Field("token_weight", "none", Choices("opd_jax.losses:TOKEN_WEIGHTS"),
          "Rule by which tokens weigh more or less, rescaled to keep the sum (docs/objectives.md)."),
    Field("token_weight_on", "all", Choices("opd_jax.losses:WEIGHTED"),
          "What token_weight and rollout_gate multiply: the teacher's advantage, or the weight of the "
          "token in all terms."),
    Field("token_weight_strength", 0.5, FROM_ZERO,
          "Strength of iw (2606.22600: 0.5), step (2605.07725: 0.2) and fire (2606.02684: 1)."),
    Field("token_weight_threshold", 0.9, SHARE,
          "prune: an overlap of the top-k sets below this is a bad token (2605.07804: 0.9)."),
    Field("token_weight_drop", 0.02, SHARE,
          "prune: what each bad token takes from the weight of all later ones (2605.07804: 0.02)."),
    Field("token_weight_least", 0.0, FROM_ZERO,
          "prune: added to every weight; selectkd: weight of other tokens (2510.24021: 0.01)."),
    Field("token_weight_keep", 0.5, Range(above=0, high=1),
          "Share of tokens that tip (2604.14084: 0.5) and ta (2605.26844: 0.05) keep, or of rollouts "
          "that fire keeps (2606.02684: 0.8)."),
    Field("token_weight_quantile", 1.0, Range(above=0.5, high=1),
          "Quantile that counts as the largest: of the entropy for tip (0.98, or 1 = no clip), of "
          "both scores for ta (2605.26844: 0.95)."),
    Field("token_weight_top_k", 16, COUNT,
          "k of the student's ids for ta (2605.26844: 16), of the teacher's for selectkd "
          "(2510.24021: 5)."),
    Field("token_weight_window", 0, FROM_ZERO,
          "step: tokens of a step; 0 = a step is a paragraph, up to a blank line."),
    Field("rollout_gate", "none", Choices("opd_jax.losses:ROLLOUT_GATES"),
          "Rollouts that count: all, the correct ones, or those on which teacher and reward agree "
          "(2607.04037)."),
    Field("rollout_gate_margin", 0.0, FROM_ZERO,
          "Least difference of the rollout's log-likelihoods for agreement, in nats (2607.04037: 0)."),
    Field("rollout_gate_reward", 0.5, Range(above=0, high=1),
          "Least reward of a rollout that counts as correct, for rollout_gate=correct and for outcome, where "
          "the reward comes from a function or a column."),
    Field("lambda_gold", 0.0, FROM_ZERO, "Weight of the supervised loss on golden solutions."),
    Field("golden_divergence", 0.0, FROM_ZERO,
          "Weight of the divergence D(student, teacher) on golden solutions (soft labels)."),
    Field("golden_direction", "forward", Choices("opd_jax.losses:DIRECTIONS"),
          "Its direction; jsd_beta, skew and reverse_share apply to both divergences."),
    Field("golden_support", "full", Choices("opd_jax.scoring.topk:SUPPORTS"),
          "Ids that it is taken over, as support on rollouts."),
    Field("golden_top_k", 16, COUNT, "k of that set."),
    Field("golden_form", "raw", Choices("opd_jax.losses:FORMS"),
          "What is done about the mass outside that set, as form on rollouts."),
    Field("golden_steps", 0, FROM_ZERO,
          "Steps over which its weight falls to 0 along a cosine; 0 = it stays."),
    Field("beta_kl", 0.0, FROM_ZERO, "Weight of KL(student || reference) on visited prefixes."),
    Field("kl_estimator", "full", Choices("opd_jax.losses:ESTIMATORS"),
          "How that KL is taken: over the full vocabulary, or estimated from the sampled token."),
    Field("kl_clamp", 10.0, FROM_ZERO,
          "Bound of the estimate k3 of a token, beyond which it has no gradient (verl: 10); 0 = none."),
    Field("aggregation", "sequence", Choices("opd_jax.losses:AGGREGATIONS"),
          "Mean over rollouts: of each response's mean (sequence), of all tokens (token), or their "
          "sum over responses * budget (constant, Dr.GRPO)."),
    Field("gold_aggregation", "token", Choices("opd_jax.losses:AGGREGATIONS", without=("constant",)),
          "The same over golden solutions."),
    Field("truncated", "keep", Choices(("keep", "mask", "tail")),
          "Rollouts that ran out of budget: keep them, mask them, or leave out their tail."),
    Field("truncated_tail", 256, COUNT, "Tokens of that tail."),
    Field("repeated", "keep", Choices(("keep", "mask")),
          "Tokens that repeat (metrics.repeated_tokens): keep them in the loss, or mask them."),
    Field("low_kl_window", 0, FROM_ZERO,
          "Tokens of the windows of the low-KL cut, which leaves out what follows a stretch of low "
          "KL(student || teacher) (docs/horizon.md; 2606.09471: 64); 0 = no cut."),
    Field("low_kl_run", 4, COUNT, "Windows in a row that must be low (2606.09471: 4)."),
    Field("low_kl_share", 0.3, SHARE,
          "The threshold is the 1 - share quantile of the lowest windows of past rollouts "
          "(2606.09471: 0.3)."),
    Field("low_kl_history", 4096, COUNT, "Past rollouts in that quantile, the latest ones."),
    Field("low_kl_rollouts", 512, COUNT, "Past rollouts before the first cut."),
    Field("low_kl_steps", 50, FROM_ZERO, "Steps before the first cut."),
))
# fmt: on
