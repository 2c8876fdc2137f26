"""The numbers of a run's loss, and what they need of models, scores and data.

A method is a set of these numbers; objective.py makes the loss from them.
"""

import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from opd_jax import losses
from opd_jax.config import default, guard_limits

ON_ROLLOUTS = ("opd", "divergence", "reference_kl")
ON_GOLDEN = ("sft", "golden_divergence")


class Divergence(NamedTuple):
    """What `losses.divergence` computes: direction and form, and the number of a direction that has one."""

    direction: str
    form: str
    share: float | None


@dataclasses.dataclass(frozen=True)
class Terms:
    """The numbers of the loss; fields as in the config section `loss`, whose table has the defaults.

    `traced_at_zero`: terms compiled in although their weight is 0, because the guard may raise it.
    """

    pg_weight: float
    teacher_coef: float
    group_coef: float
    group_normalise: bool
    advantage: str
    advantage_clamp: float
    discount: float
    advantage_shape: str
    advantage_shape_value: float
    extrapolation: float
    evidence_share: float
    evidence_steps: int
    evidence_clip: float
    evidence_away: bool
    evidence_correct_only: bool
    outcome: str
    outcome_value: float
    support_weight: str
    clip_low: float
    clip_high: float
    dual_clip: float
    importance_cap: float
    divergence_weight: float
    support: str
    top_k: int
    direction: str
    form: str
    jsd_beta: float
    skew: float
    reverse_share: float
    span_events: str
    gate: str
    gate_threshold: float
    token_weight: str
    token_weight_on: str
    token_weight_strength: float
    token_weight_threshold: float
    token_weight_drop: float
    token_weight_least: float
    token_weight_keep: float
    token_weight_quantile: float
    token_weight_top_k: int
    token_weight_window: int
    rollout_gate: str
    rollout_gate_margin: float
    rollout_gate_reward: float
    lambda_gold: float
    golden_divergence: float
    golden_direction: str
    golden_support: str
    golden_top_k: int
    golden_form: str
    golden_steps: int
    beta_kl: float
    kl_estimator: str
    kl_clamp: float
    traced_at_zero: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term by its name in `loss/NAME`, as configured; see `weights_at`."""
        return {
            "opd": self.pg_weight,
            "divergence": self.divergence_weight,
            "reference_kl": self.beta_kl,
            "sft": self.lambda_gold,
            "golden_divergence": self.golden_divergence,
        }

    def weights_at(self, step: int) -> dict[str, float]:
        """Return `weights` at step 1, 2, ... of the run: that of the golden divergence may fall."""
        weight = losses.annealed(step, weight=self.golden_divergence, steps=self.golden_steps)
        return self.weights | {"golden_divergence": weight}

    @property
    def names(self) -> tuple[str, ...]:
        """The terms that are compiled in."""
        return tuple(name for name, w in self.weights.items() if w or name in self.traced_at_zero)

    @property
    def needs_rollouts(self) -> bool:
        """Whether any term is computed on the student's own rollouts."""
        return any(name in ON_ROLLOUTS for name in self.names)

    @property
    def needs_golden(self) -> bool:
        """Whether golden solutions are needed."""
        return any(name in ON_GOLDEN for name in self.names)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is needed, to score rollouts or in the update."""
        return self.scores_reference or "reference_kl" in self.names

    @property
    def scores_reference(self) -> bool:
        """Whether rollouts are scored with the reference: the advantage is extrapolated from it."""
        by_sampled = self.pg_weight and self.teacher_coef and not self.on_support
        return bool(by_sampled) and self.extrapolation != 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.teaches_rollouts or self.golden_divergence != 0

    @property
    def teaches_rollouts(self) -> bool:
        """Whether any term on rollouts needs the teacher."""
        by_teacher = self.teacher_coef or (self.group_coef and self.evidence_share)
        return bool(self.pg_weight and by_teacher) or self.divergence_weight != 0

    @property
    def needs_reward(self) -> bool:
        """Whether it must be known which rollouts are correct, or their reward, by any term or rule."""
        by_rule = self.rollout_gate != "none" or self.outcome != "none"
        return bool(self.pg_weight and self.group_coef) or by_rule

    @property
    def on_support(self) -> bool:
        """Whether the surrogate sums over the ids of a support."""
        return bool(self.pg_weight and self.teacher_coef) and self.advantage == "support"

    @property
    def scored_support(self) -> tuple[str, int] | None:
        """The support that the scorer must record, for `scoring.score`; None where no term has one."""
        if self.support == "full" or not (self.on_support or self.divergence_weight):
            return None
        return self.support, self.top_k

    @property
    def on_rollouts(self) -> "Divergence":
        """The divergence on rollouts."""
        return Divergence(self.direction, self.form, self._share_of(self.direction))

    @property
    def on_golden(self) -> "Divergence":
        """The divergence on golden solutions."""
        direction = self.golden_direction
        return Divergence(direction, self.golden_form, self._share_of(direction))

    def _share_of(self, direction: str) -> float | None:
        """The number that a direction has; None where it has none."""
        skewed = {"skewed_reverse": self.skew, "skewed_forward": self.skew}
        return ({"jsd": self.jsd_beta, "mixture": self.reverse_share} | skewed).get(direction)

    @property
    def gated(self) -> bool:
        """Whether the divergence has a gate."""
        return self.divergence_weight != 0 and self.gate != "none"

    @property
    def token_rule(self) -> str:
        """The rule of the tokens' weights; none where no term of the teacher has them."""
        by_teacher = bool(self.pg_weight and self.teacher_coef)
        weighed = by_teacher if self.token_weight_on == "teacher" else self.teaches_rollouts
        return self.token_weight if weighed else "none"

    @property
    def scored_statistic(self) -> tuple[str, int] | None:
        """The statistic that the scorer must record for the tokens' weights; None where they need none."""
        name = {"ta": "teacher_mass", "selectkd": "student_accepted"}.get(self.token_rule)
        return None if name is None else (name, self.token_weight_top_k)

    @property
    def over_vocabulary(self) -> bool:
        """Whether the update needs the teacher's full distribution on rollouts.

        It is computed from the teacher's hidden states and its output matrix.
        """
        return self.divergence_weight != 0 and self.support == "full"

    @property
    def golden_over_vocabulary(self) -> bool:
        """Whether the update needs the teacher's full distribution on golden solutions."""
        return self.golden_divergence != 0 and self.golden_support == "full"

    @property
    def reads_head(self) -> bool:
        """Whether the update reads the teacher's output matrix, on rollouts or on golden solutions."""
        return self.over_vocabulary or self.golden_over_vocabulary

    @property
    def golden_scored_support(self) -> tuple[str, int] | None:
        """The support that the scorer must record on golden solutions; None where no term has one."""
        if self.golden_support == "full" or not self.golden_divergence:
            return None
        return self.golden_support, self.golden_top_k


def warnings(terms: Terms) -> list[str]:
    """Return a line for each choice in `terms` that the papers found not to work."""
    notes = []
    kinds = [("", terms.support, terms.form, terms.direction, terms.top_k)] * bool(
        terms.divergence_weight
    ) + [
        (
            "golden_", terms.golden_support, terms.golden_form, terms.golden_direction,
            terms.golden_top_k,
        )
    ] * bool(terms.golden_divergence)  # fmt: skip
    for prefix, support, form, direction, k in kinds:
        if support == "full":
            continue
        if form == "raw" and direction == "reverse":
            notes.append(
                "note: the raw reverse KL over a support pushes all of its ids down, which made runs "
                f"collapse (2603.25562, 2605.11182); loss.{prefix}form renormalised, tail and "
                "stop_gradient do not"
            )
        if k == 1:
            notes.append(
                f"note: loss.{prefix}top_k=1 was the one size that did clearly worse (2604.13016, 6.3)"
            )
    if terms.beta_kl and terms.kl_estimator == "k1":
        notes.append(
            "note: the gradient of loss.kl_estimator=k1 is 0 in expectation: it measures the KL and "
            "does not hold the student back; full, k2 and k3 do"
        )
    return notes


def make_terms(config: ConfigDict) -> Terms:
    """Return the loss's numbers from the config section `loss`."""
    traced_at_zero = ["reference_kl"] * guard_limits.may_raise_beta_kl(config)
    traced_at_zero += ["sft"] * guard_limits.may_raise_lambda_gold(config)
    return Terms(**_numbers(config.loss), traced_at_zero=tuple(traced_at_zero))


def default_terms(**changes: Any) -> Terms:
    """Return the loss with the defaults of the config's table, except for `changes`."""
    return Terms(**(_numbers(default().loss) | changes))


def _numbers(section: ConfigDict) -> dict[str, Any]:
    return {
        field.name: section[field.name]
        for field in dataclasses.fields(Terms)
        if field.name in section
    }
