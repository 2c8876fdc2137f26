"""The advantage of each token, from scores, verdicts and rewards. Host arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import losses
from opd_jax.losses import outcome
from opd_jax.training.terms import Terms
from opd_jax.types import Rollout, Scores


@dataclasses.dataclass(frozen=True)
class Reward:
    """The reward of a step's rollouts, whatever its source.

    Attributes:
      reward_B: of each rollout, from 0 to 1: its verdict, or the number from a function or a column.
      group: rollouts of a prompt, which are adjacent.
      graded_B: bool, the rollouts whose reward is known; None for all.
    """

    reward_B: np.ndarray
    group: int
    graded_B: np.ndarray | None = None

    @property
    def known_B(self) -> np.ndarray:
        """The rollouts whose reward is known; bool [B]."""
        return np.ones(len(self.reward_B), bool) if self.graded_B is None else self.graded_B

    def correct_B(self, least: float) -> np.ndarray:
        """Return the rollouts that gates and outcomes take as correct; bool [B], False where not known.

        `least` is loss.rollout_gate_reward: the least reward of a correct rollout. A verdict is 0 or 1, so
        that every `least` leaves it as it is.
        """
        return self.known_B & (np.asarray(self.reward_B, np.float32) >= np.float32(least))

    def advantage(self, *, normalise: bool) -> jax.Array:
        """Return `losses.group_advantage` of the reward; float32 [B]."""
        return losses.group_advantage(
            reward_B=jnp.asarray(self.reward_B, jnp.float32),
            group=self.group,
            normalise=normalise,
            counted_B=None if self.graded_B is None else jnp.asarray(self.graded_B),
        )


def advantages(
    rollout: Rollout,
    scores: Scores,
    mask_BT: np.ndarray,
    terms: Terms,
    *,
    reward: Reward | None = None,
    step: int = 1,
    factor_BT: np.ndarray | None = None,
) -> np.ndarray:
    """Return the advantage of each sampled token; float32 [B, T], 0 on tokens that are not scored.

    w (teacher_coef * A_teacher + group_coef * A_group). A_teacher is that of `_teacher_advantage`, changed by
    `_by_outcome` (over a support it is `losses.support_advantage`, not here). A_group is that of the `reward`
    (None where no term or rule needs it), times the teacher's evidence where that has a share; the share may
    fall with the run's `step`. `factor_BT` multiplies A_teacher. w is the truncated importance weight.
    """
    total_BT = np.zeros(mask_BT.shape, np.float32)
    if terms.pg_weight and terms.teacher_coef and not terms.on_support:
        teacher_BT = _teacher_advantage(scores, mask_BT, terms)
        if terms.outcome != "none":
            assert reward is not None
            teacher_BT = _by_outcome(teacher_BT, scores, mask_BT, terms, reward)
        if factor_BT is not None:
            teacher_BT = teacher_BT * factor_BT
        total_BT += terms.teacher_coef * teacher_BT
    if terms.pg_weight and terms.group_coef:
        assert reward is not None
        group_B = reward.advantage(normalise=terms.group_normalise)
        group_BT = np.asarray(group_B)[:, None]
        if terms.evidence_share:
            group_BT = group_BT * losses.evidence_weight(
                teacher_logprob_BT=jnp.asarray(scores.teacher_logprob_BT),
                student_logprob_BT=jnp.asarray(scores.student_logprob_BT),
                group_B=group_B,
                clip=terms.evidence_clip,
                share=losses.share_at(step, share=terms.evidence_share, steps=terms.evidence_steps),
                away=terms.evidence_away,
                correct_only=terms.evidence_correct_only,
            )
        total_BT += terms.group_coef * np.asarray(group_BT)
    if terms.importance_cap:
        total_BT *= np.asarray(
            losses.truncated_importance(
                logprob_BT=jnp.asarray(scores.student_logprob_BT),
                sampler_logprob_BT=jnp.asarray(rollout.sampler_logprob_BT),
                cap=terms.importance_cap,
            )
        )
    return np.where(mask_BT, total_BT, 0.0).astype(np.float32)


def _teacher_advantage(scores: Scores, mask_BT: np.ndarray, terms: Terms) -> np.ndarray:
    """Return the teacher's advantage of each sampled token: extrapolated, shaped, clamped, discounted.

    In this order: the shape is a function of one token's log-probs, the clamp bounds what the shape returns,
    and the discount sums what the clamp returns. Each step is left out at its default.

    Of a teacher with another tokenizer the log-probs are those of the token's span, for both models: the
    span is one action. Each of the student's tokens has the span's whole advantage A, because
    A grad log p(span) = A sum of grad log p(y_t) over its tokens; over the tokens of a span of n they sum
    to n A. (Our own step below SimCT, 2605.07711, and GOLD, which compare distributions at a span.)
    """
    by = scores if scores.spans is None else scores.spans
    teacher_BT = jnp.asarray(by.teacher_logprob_BT)
    if terms.scores_reference:
        teacher_BT = losses.extrapolated(
            teacher_logprob_BT=teacher_BT,
            reference_logprob_BT=jnp.asarray(scores.reference_logprob_BT),
            extrapolation=terms.extrapolation,
        )
    shaped_BT = losses.shaped(
        teacher_logprob_BT=teacher_BT,
        student_logprob_BT=jnp.asarray(by.student_logprob_BT),
        shape=terms.advantage_shape,
        value=terms.advantage_shape_value,
        reverse_kl_BT=scores.reverse_kl_BT,
    )
    advantage_BT = np.where(mask_BT, shaped_BT, 0.0)
    if terms.advantage_clamp:
        advantage_BT = np.clip(advantage_BT, -terms.advantage_clamp, terms.advantage_clamp)
    if terms.discount:
        advantage_BT = losses.discounted(
            reward_BT=jnp.asarray(advantage_BT), discount=terms.discount
        )
    return np.asarray(advantage_BT)


def _by_outcome(
    teacher_BT: np.ndarray,
    scores: Scores,
    mask_BT: np.ndarray,
    terms: Terms,
    reward: Reward,
) -> np.ndarray:
    """Return the teacher's advantage of each token as the outcome of its rollout changes it; [B, T].

    Means are over the tokens of `mask_BT`, of what the shape, the clamp and the discount return.
    """
    length_B = np.sum(mask_BT, axis=1)
    correct_B, known_B = (
        reward.correct_B(terms.rollout_gate_reward),
        reward.known_B & (length_B > 0),
    )

    def mean(values_BT: np.ndarray) -> np.ndarray:
        total_B = np.sum(np.where(mask_BT, values_BT, 0.0), axis=1, dtype=float)
        return total_B / np.maximum(length_B, 1)

    given = {"correct_B": correct_B, "known_B": known_B, "group": reward.group}
    with np.errstate(invalid="ignore", over="ignore"):  # scores that are not finite skip the update
        if terms.outcome == "margin":
            shift_B = outcome.margin_shift(
                mean_B=mean(teacher_BT), margin=terms.outcome_value, **given
            )
            return teacher_BT + shift_B[:, None]
        weight_B = outcome.route_weights(
            student_mean_B=mean(np.asarray(scores.student_logprob_BT)),
            teacher_mean_B=mean(np.asarray(scores.teacher_logprob_BT)),
            temperature=terms.outcome_value, **given,
        )  # fmt: skip
        return weight_B[:, None] * np.where(correct_B[:, None], 1.0, teacher_BT)
