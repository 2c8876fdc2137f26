"""No field of the loss is ignored: another value changes what is computed, or is refused in one line."""

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import opd
from opd_jax import losses
from opd_jax.config.no_effect import unused
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.grading.grader import Grade
from opd_jax.models import decoder
from opd_jax.training import batch as rows_of
from opd_jax.training import low_kl, objective
from opd_jax.training.experience import Experience
from opd_jax.training.step import Step
from opd_jax.training.terms import Terms, make_terms
from opd_jax.types import Frozen, Scores, Support
from tests.conftest import tiny_config
from tests.support.lanes import slow
from tests.training.test_topk_objective import MASK, SAMPLED

CONFIG = tiny_config(num_layers=1)
OTHER = {
    "pg_weight": 0.5, "teacher_coef": 0.5, "group_coef": 0.5, "group_normalise": False,
    "advantage": "support", "advantage_clamp": 0.1, "discount": 0.5, "support_weight": "uniform",
    "advantage_shape": "soft_log", "advantage_shape_value": 0.3, "extrapolation": 1.5,
    "evidence_share": 0.25, "evidence_steps": 7, "evidence_clip": 0.05, "evidence_away": True,
    "evidence_correct_only": True,
    "clip_low": 0.1, "clip_high": 0.1, "dual_clip": 3.0, "importance_cap": 2.0,
    "divergence_weight": 0.5, "support": "student", "top_k": 3, "direction": "forward",
    "form": "renormalised", "jsd_beta": 0.1, "skew": 0.3, "lambda_gold": 0.5, "beta_kl": 0.5,
    "kl_estimator": "k2", "kl_clamp": 5.0, "aggregation": "token", "gold_aggregation": "sequence",
    "truncated": "mask", "truncated_tail": 2, "repeated": "mask", "reverse_share": 0.3,
    "gate": "acceptance", "gate_threshold": 0.25, "token_weight": "iw", "token_weight_on": "teacher",
    "token_weight_strength": 1.5, "token_weight_threshold": 0.5, "token_weight_drop": 0.3,
    "token_weight_least": 0.3, "token_weight_keep": 0.3, "token_weight_quantile": 0.7,
    "token_weight_top_k": 3, "token_weight_window": 2, "rollout_gate": "correct",
    "rollout_gate_margin": 3.0, "rollout_gate_reward": 0.9,
    "golden_divergence": 0.5, "golden_direction": "reverse",
    "golden_support": "student", "golden_top_k": 3, "golden_form": "renormalised", "golden_steps": 7,
    "outcome": "margin", "outcome_value": 2.5,
    "low_kl_window": 2, "low_kl_run": 2, "low_kl_share": 0.4, "low_kl_history": 99,
    "low_kl_rollouts": 9, "low_kl_steps": 9, "span_events": "sorted",
}  # fmt: skip
# A margin of 0 shifts only prompts whose wrong rollouts are above the correct ones.
ITS_NUMBER = {"outcome": {"outcome_value": 2.5}}
NO_SURROGATE = {"pg_weight": 0.0}
DIVERGENCE = NO_SURROGATE | {"divergence_weight": 1.0}
METHODS = {
    "OPD": {},
    "truncated": {"truncated": "tail", "truncated_tail": 1},
    "surrogate over a support": {"advantage": "support", "support": "union"},
    "with rewards": {"advantage": "support", "support": "union", "group_coef": 1.0},
    "GRPO": {"teacher_coef": 0.0, "group_coef": 1.0},
    "RLSD": {"teacher_coef": 0.0, "group_coef": 1.0, "evidence_share": 0.5},
    "power": {"advantage_shape": "power", "advantage_shape_value": 2.0},
    "the student's unlikely tokens": {"advantage_shape": "unlikely", "advantage_shape_value": 0.1},
    "divergence": DIVERGENCE | {"direction": "jsd"},
    "skewed over a support": DIVERGENCE
    | {"direction": "skewed_reverse", "form": "tail", "support": "teacher"},
    "reference alone": NO_SURROGATE | {"beta_kl": 1.0, "kl_estimator": "k3"},
    "EOPD": {
        "divergence_weight": 1.0,
        "direction": "forward",
        "support": "teacher",
        "form": "teacher_renormalised",
        "gate": "entropy",
        "gate_threshold": 1.0,
    },
    "AOPD": {
        "divergence_weight": 1.0,
        "direction": "forward",
        "support": "teacher",
        "gate": "advantage",
    },
    "mixture": DIVERGENCE
    | {"direction": "mixture", "token_weight": "tip", "token_weight_quantile": 0.98},
    "RG-OPD": {"group_coef": 1.0, "rollout_gate": "agreement", "token_weight_on": "teacher"},
    "Prune-OPD": {"token_weight": "prune"},
    "SOD": {"token_weight": "step", "token_weight_window": 3, "token_weight_on": "teacher"},
    "FiRe": {
        "token_weight": "fire",
        "token_weight_keep": 0.9,
        "advantage": "support",
        "support": "student",
    },
    "TA-OPD": {"token_weight": "ta", "token_weight_keep": 0.1},
    "SelecTKD": {"token_weight": "selectkd", "token_weight_least": 0.1},
    "KAT": {"low_kl_window": 3},
    "Uni-OPD": {"outcome": "margin", "outcome_value": 0.4, "advantage_clamp": 10.0},
    "SCOPE": {"outcome": "route", "outcome_value": 1.0},
    "SFT": NO_SURROGATE | {"lambda_gold": 1.0},
    "soft labels": NO_SURROGATE | {"golden_divergence": 1.0, "golden_direction": "jsd"},
    "BRTS": {
        "advantage": "support",
        "support": "student",
        "golden_divergence": 10.0,
        "golden_support": "teacher",
        "golden_form": "teacher_renormalised",
    },
}

FAST = ("OPD", "SFT")  # the others in the slow lane


def config_of(changes: dict):
    config = opd.get_config()
    config.loss.update(changes)
    return config


@functools.cache
def experience() -> Experience:
    """Rollouts with scores and grades that nothing leaves as they are."""
    generator = np.random.default_rng(0)
    shape = SAMPLED.tokens_BT.shape

    def logprobs(*more: int) -> np.ndarray:
        return -generator.uniform(0.5, 3.0, (*shape, *more)).astype(np.float32)

    support = Support(
        ids_BTX=np.arange(4, dtype=np.int32) + np.zeros((*shape, 1), np.int32),
        student_BTX=logprobs(4), teacher_BTX=logprobs(4), teacher_rest_BT=logprobs(),
    )  # fmt: skip
    scores = Scores(
        student_logprob_BT=logprobs(), student_entropy_BT=logprobs(), teacher_logprob_BT=logprobs(),
        reference_logprob_BT=logprobs(), teacher_entropy_BT=-logprobs(), reverse_kl_BT=-logprobs(),
        overlap_ratio_BT=generator.uniform(size=shape).astype(np.float32),
        statistic_BT=(generator.integers(0, 2, shape) * generator.uniform(size=shape)).astype(np.float32),
        support=support, teacher_hidden_BTD=logprobs(CONFIG.hidden_size),
    )  # fmt: skip
    repeated_BT = generator.uniform(size=shape) < 0.3
    grades = [Grade.CORRECT, Grade.WRONG, Grade.CORRECT, Grade.CORRECT]
    flagged_B = np.zeros(len(MASK), bool)
    return Experience(SAMPLED, scores, MASK, repeated_BT, flagged_B, grades, [""] * len(MASK))


def computed(config) -> tuple:
    """What an update is made of: programs as text, and the bytes of its rows."""
    terms, loss = make_terms(config), config.loss
    given = experience()
    config.log.rollouts = 0
    config.rollout.samples_per_prompt = 2
    weigh = functools.partial(losses.token_weights, aggregation=loss.aggregation, length=7)
    step = SimpleNamespace(
        setup=SimpleNamespace(terms=terms, tokenizer=SimpleNamespace(decode=str)), config=config,
        functions=SimpleNamespace(weigh=weigh),
    )  # fmt: skip
    batch = SimpleNamespace(problems=[SimpleNamespace(id="a"), SimpleNamespace(id="b")])
    rows: Any = None
    if terms.needs_rollouts:
        # At step 1 a share that falls over steps has not fallen yet.
        rows, *_ = Step._rollout_rows(step, 2, given, batch, masking=False)
        if terms.scored_support is None:
            rows = rows.replace(support=None)
    golden = None
    if terms.needs_golden:
        weigh = functools.partial(losses.token_weights, aggregation=loss.gold_aggregation)
        scores = given.scores.replace(
            support=given.scores.support if terms.golden_scored_support else None
        )
        golden = rows_of.golden_rows(SAMPLED, weigh=weigh, scores=scores, scored_BT=MASK)
    arrays = [(x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves((rows, golden))]
    scored = terms.needs_rollouts and terms.needs_teacher
    cut = low_kl.make_rules(loss) if loss.low_kl_window and scored else None
    return (
        program(terms, rows, golden),
        arrays,
        cut,
        terms.scored_support,
        terms.scored_statistic,
        terms.golden_scored_support,
        # Weights at the first step and at a later one, at which some have fallen.
        *(tuple(terms.weights_at(step).items()) for step in (1, 3)),
    )


class Noted:
    """The numbers of a loss, which note what is read of them in `read`."""

    def __init__(self, terms: Terms):
        self.terms, self.read = terms, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(Terms, name, None)
        if isinstance(found, property):
            return found.fget(self)
        value = getattr(self.terms, name)
        if callable(value):
            return functools.partial(getattr(Terms, name), self)
        self.read[name] = value
        return value


TRACED: list[tuple[str, dict[str, Any], str]] = []  # shapes of rows, numbers read, program


def program(terms: Terms, rows: Any, golden: Any) -> str:
    """The gradients of the losses as text, traced anew only where an input differs that a trace has read."""
    shapes = str(jax.tree.map(lambda x: (x.shape, x.dtype), (rows, golden)))
    for others, read, text in TRACED:
        if others == shapes and all(getattr(terms, name) == value for name, value in read.items()):
            return text
    noted: Any = Noted(terms)
    params, text = decoder.abstract_params(CONFIG), ""
    frozen = Frozen(teacher=decoder.head_alone(params), reference=params)
    if noted.needs_rollouts:
        made = objective.make_rollout_loss(noted, CONFIG, CONFIG, token_chunk=7, remat="none")
        text += str(
            jax.make_jaxpr(jax.grad(made, has_aux=True))(params, frozen, rows, noted.weights)
        )
    if noted.golden_divergence:  # the supervised term has no number but its weight
        made = objective.make_golden_loss(noted, CONFIG, token_chunk=7, remat="none")
        frozen = Frozen(teacher=decoder.head_alone(params))
        text += str(
            jax.make_jaxpr(jax.grad(made, has_aux=True))(params, frozen, golden, noted.weights)
        )
    text = re.sub(r"0x[0-9a-f]+", "", text)
    TRACED.append((shapes, noted.read, text))
    return text


@pytest.mark.parametrize("method", [*FAST, *slow(*(name for name in METHODS if name not in FAST))])
def test_a_field_changes_what_is_computed_or_is_known_to_be_without_effect(method):
    base = config_of(METHODS[method])
    validate(base)
    assert set(OTHER) == set(base.loss)
    before = computed(base)
    wrong = []
    for field, value in OTHER.items():
        changed = config_of(METHODS[method] | {field: value} | ITS_NUMBER.get(field, {}))
        if base.loss[field] == value or (field not in unused(changed) and refused(changed)):
            continue
        if (computed(changed) == before) != (field in unused(changed)):
            wrong.append(field)
    assert not wrong


def refused(config) -> bool:
    try:
        validate(config)
    except ConfigError:
        return True
    return False


def test_what_is_without_effect_is_refused_and_the_default_is_not():
    config = config_of({"dual_clip": 3.0, "pg_weight": 0.0, "beta_kl": 1.0})
    with pytest.raises(
        ConfigError, match=r"loss.dual_clip=3.0 has no effect: loss.pg_weight=0; le"
    ):
        validate(config)
    config.loss.dual_clip = 0.0
    validate(config)
