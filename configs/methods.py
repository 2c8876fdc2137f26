"""Published methods by name: each is a set of numbers, with the source of every number beside it.

python launch/train.py --config=configs/methods.py:vopd
python launch/train.py --config=configs/methods.py:exopd,qwen3-1.7b,data=FILE

`configs/methods.py:NAME[,RECIPE[,key=value...]]`; recipes and options are those of configs/recipes.py, and
the recipe is `tiny` where none is named. docs/objectives.md has the equation of every method. How well a
number is known stands beside it:

    found         read in the paper's text or in its authors' code
    second-hand   in independent notes or re-implementations
    unknown       no source was found; the number is a choice of this project

Numbers under `run` (learning rate, batch, lengths) are those of the paper's own training. They replace the
recipe's, except in the recipes `tiny` and `smollm2-135m`, which are far smaller than any paper's run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import recipes
from opd_jax.config.schema import near
from opd_jax.errors import ConfigError

_SMALL = ("tiny", "smollm2-135m")
_DIVERGENCE = {"loss.pg_weight": 0.0, "loss.divergence_weight": 1.0}
_FORWARD = {  # beside the surrogate
    "loss.divergence_weight": 1.0,
    "loss.direction": "forward",
    "loss.support": "teacher",
}
_GOLDEN = {
    "loss.pg_weight": 0.0,
    "loss.golden_divergence": 1.0,
    "loss.aggregation": "sequence",  # the default: it applies to rollouts, of which there are none
}
_AOPD = _FORWARD | {
    "loss.top_k": 10,  # second-hand, one source
    "loss.gate": "advantage",  # second-hand
    "loss.gate_threshold": 0.0,  # second-hand
}
_REWARD = {
    "loss.teacher_coef": 0.0,
    "loss.group_coef": 1.0,
    "rollout.samples_per_prompt": 8,  # LUFFY's on-policy RL: n = 8
}
_LUFFY = {"rollout.prompts_per_step": 128}  # LUFFY: batch 128
_PLAN = (
    "{problem}\n\nHere is a solution to this problem:\n{solution}\n\nDo not solve the problem again. From "
    "this solution make a short plan: the ideas that are needed, and the steps in their order."
)
_BY_PLAN = (
    "{problem}\n\nA plan for a solution:\n{plan}\n\nThe answer, with which you may check yours: {answer}\n"
    "Solve the problem by this plan, step by step. " + recipes.BOXED
)
ITSELF, NOBODY = "itself", "nobody"


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
      source: arXiv id, and what was read.
      numbers: fields and their values. run: likewise, of the paper's own training.
      teacher: "" = the recipe's; ITSELF = the student, shown the golden solution; NOBODY = none.
      horizon: shares of the recipe's response budget at which rollouts end one after the other; answers to
        held-out problems have the whole budget. A last share of 1 is the whole budget; () = always that.
    """

    source: str
    numbers: Mapping[str, Any]
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = ""
    horizon: tuple[float, ...] = ()


METHODS: dict[str, Method] = {
    # Sums over the sampled token, over the vocabulary, over a support.
    "opd": Method("2604.08527, section 2", {}),
    "stable_opd": Method(
        "2604.08527, Eq. 6",
        {
            "loss.lambda_gold": 0.1,  # unknown in the paper; 0.1 in two re-implementations
            "loss.beta_kl": 0.01,  # unknown in the paper; 0.01 in two re-implementations
        },
    ),
    "full_opd": Method("2604.08527, Eq. 2: reverse KL over the whole vocabulary", _DIVERGENCE),
    "topk_opd": Method(
        "2603.25562, local support matching",
        _DIVERGENCE
        | {
            "loss.support": "teacher",  # found
            "loss.form": "renormalised",  # found
            "loss.aggregation": "token",  # found
            "loss.top_k": 32,  # found; of tiny's 308 ids a few hold nearly all of the mass
        },
        run={"rollout.top_p": 0.9},  # found
    ),
    "support_opd": Method(
        "2604.13016 and its code",
        {
            "loss.advantage": "support",  # found
            "loss.support": "student",  # found
            "loss.top_k": 16,  # found
        },
    ),
    "gkd": Method(
        "2306.13649, on-policy, and TRL's trainer",
        _DIVERGENCE | {"loss.direction": "jsd", "loss.jsd_beta": 0.5},  # TRL's default
    ),
    "distillm": Method(
        "2402.03898, skewed reverse KL",
        _DIVERGENCE | {"loss.direction": "skewed_reverse", "loss.skew": 0.1},  # found
    ),
    # Texts of a teacher with another tokenizer (docs/spans.md).
    "simct": Method(
        "2605.07711v2 and its code, sunjie279/SimCT- at 4dae6fc",
        _DIVERGENCE
        | {
            "loss.span_events": "candidates",  # found
            "loss.aggregation": "token",  # found in the code: divided by the tokens of the batch
        },
        run={
            "optim.learning_rate": 1e-6,  # found in the paper; 5e-7 in the code
            "rollout.prompts_per_step": 64,  # found in the code
            "rollout.samples_per_prompt": 1,  # found in the code
            "rollout.max_response_tokens": 4096,  # found
            "rollout.temperature": 0.6,  # found
            "rollout.top_p": 0.95,  # found
        },
    ),
    "uld": Method(
        "2402.12030, as GOLD in TRL 1.16 has it, uld_token_merge_strategy=bayesian",
        _DIVERGENCE | {"loss.span_events": "sorted", "scoring.compare": "spans"},
    ),
    "gold": Method(
        "GOLD, uld_use_hybrid_loss, in TRL 1.16, uld_token_merge_strategy=bayesian; its JSD is 2306.13649's",
        _DIVERGENCE
        | {
            "loss.span_events": "matched",
            "loss.direction": "jsd",
            "loss.jsd_beta": 0.5,  # TRL's default
            "scoring.compare": "spans",
        },
    ),
    # Shapes of the teacher's advantage.
    "clamped_opd": Method("2603.25562", {"loss.advantage_clamp": 5.0}),  # found
    "vopd": Method("2605.07865, Eq. 9", {"loss.advantage_shape": "baseline"}),  # second-hand
    "power_opd": Method(
        "2606.17199",
        {
            "loss.advantage_shape": "power",  # second-hand
            "loss.advantage_shape_value": 2.0,  # unknown; "larger is better", 2 in a test of a code
        },
    ),
    "soft_log_opd": Method("2607.13399", {"loss.advantage_shape": "soft_log"}),  # second-hand
    "reopold": Method(
        "2603.11137, Eq. 7; without its entropy mask and stages, whose thresholds are unknown",
        {
            "loss.advantage_shape": "floor",  # second-hand
            "loss.advantage_shape_value": 0.2,  # unknown; the paper wants it below 1/2
        },
    ),
    "skewed_opd": Method(
        "2402.03898, one sample of its skewed reverse KL",
        {"loss.advantage_shape": "skew", "loss.advantage_shape_value": 0.1},  # found
    ),
    "opd_plus_reverse": Method("2606.01039", {"loss.advantage_shape": "f_reverse"}),  # second-hand
    "opd_plus_forward": Method("2606.01039", {"loss.advantage_shape": "f_forward"}),  # second-hand
    "opd_plus_jsd": Method("2606.01039", {"loss.advantage_shape": "f_jsd"}),  # second-hand
    "tv_opd": Method(
        "total variation, in two notes on 2606.01039",
        {"loss.advantage_shape": "f_total_variation"},  # second-hand; its factor 1/2 inferred
    ),
    "unlikely_control": Method(
        "2608.31046: a control that does not read the teacher",
        {
            "loss.advantage_shape": "unlikely",  # second-hand
            "loss.advantage_shape_value": 0.1,  # unknown
        },
    ),
    # Past the teacher, or between it and the reference.
    "exopd": Method(
        "2602.12125; the authors' code is RUCBM/G-OPD, read in EasyOPD's version",
        {"loss.extrapolation": 1.25},  # second-hand
        run={
            "optim.learning_rate": 1e-5,  # second-hand
            "rollout.prompts_per_step": 1024,  # second-hand
            "rollout.samples_per_prompt": 1,  # second-hand
            "rollout.max_response_tokens": 16_384,  # second-hand
            "loss.importance_cap": 5.0,  # second-hand
        },
    ),
    "g_opd_interpolated": Method("2602.12125", {"loss.extrapolation": 0.5}),  # second-hand
    # Two directions: mixed at every token, or chosen token by token by a gate.
    "mixed_kl": Method(
        "2605.16826; its best share is not known",
        _DIVERGENCE
        | {
            "loss.direction": "mixture",  # second-hand
            "loss.reverse_share": 0.25,  # unknown; second-hand that more forward than reverse is best
        },
    ),
    "eopd": Method(
        "2603.07079, a fork of its code (dp_actor), scripts and README",
        _FORWARD
        | {
            "loss.form": "teacher_renormalised",  # found; an audit reads the code as raw
            "loss.top_k": 16,  # found in the code; 32 in the README
            "loss.gate": "entropy",  # found
            "loss.gate_threshold": 0.8,  # found
            "loss.aggregation": "token",  # found: the mean over all counted tokens
        },
        run={
            "optim.learning_rate": 3e-6,  # found
            "optim.schedule": "cosine",  # found
            "rollout.prompts_per_step": 128,  # found
            "rollout.samples_per_prompt": 1,  # found
            "optim.updates_per_rollout": 4,  # found: minibatches of 32
            "rollout.max_response_tokens": 4096,  # found
        },
    ),
    "aopd": Method("2605.06387, in four notes and re-implementations", _AOPD),
    "aopd_mean": Method(
        "2605.06387, the reading of one source that divides the forward KL by K",
        _AOPD | {"loss.divergence_weight": 0.1},  # second-hand, one source: 1 / K
    ),
    "aopd_margin": Method(
        "2605.06387, the reading of one source whose gate opens where p - q > .1",
        _AOPD | {"loss.gate_threshold": -0.1},  # second-hand, one source
    ),
    "tropd": Method(
        "2606.01249; one note anneals the length of the teacher's prefixes instead of the weight",
        _FORWARD
        | {
            "loss.top_k": 64,  # second-hand
            "loss.gate": "acceptance",  # second-hand
            # The third term, on the teacher's own prefixes: the golden solutions are to be the teacher's.
            "loss.golden_divergence": 0.001,  # second-hand
            "loss.golden_direction": "forward",  # second-hand
            "loss.golden_support": "teacher",  # inferred: that of the term on rollouts
            "loss.golden_top_k": 64,  # inferred likewise
            "loss.golden_steps": 200,  # second-hand: a cosine to 0; that over the whole run is inferred
        },
        run={
            "optim.learning_rate": 5e-6,  # second-hand
            "rollout.prompts_per_step": 128,  # second-hand
            "rollout.samples_per_prompt": 4,  # second-hand
            "rollout.max_response_tokens": 8096,  # second-hand
        },
    ),
    # Prefix source x direction (2605.16826): the fourth cell, on the student's prefixes, is `full_opd`.
    "soft_kd": Method(
        "2605.16826: the teacher's distribution on golden solutions, forward",
        _GOLDEN,
    ),
    "offline_rl": Method(
        "2605.16826: reverse KL on golden solutions",
        _GOLDEN | {"loss.golden_direction": "reverse"},  # second-hand
    ),
    "dagger": Method(
        "2605.16826: forward KL on the student's own rollouts",
        _DIVERGENCE | {"loss.direction": "forward"},  # second-hand
    ),
    "brts": Method(
        "2605.09725 and its code (dp_actor.py, teacher_selection.py); launch/sample.py chooses its golden "
        "solutions",
        {
            "loss.advantage": "support",  # found in the code: the weighted log-ratios of 2604.13016's code
            "loss.support": "student",  # found
            "loss.top_k": 16,  # found
            "loss.golden_divergence": 10.0,  # found in the paper; .05 in the code, where it is off by default
            "loss.golden_direction": "forward",  # found
            "loss.golden_support": "teacher",  # found
            "loss.golden_top_k": 16,  # found
            # Found in the code: q alone is divided by its mass, which gives this form's gradient.
            "loss.golden_form": "teacher_renormalised",
            "sample.choose": "overlap",  # found
            "sample.choose_top_k": 16,  # found
            "sample.samples": 4,  # unknown
        },
        run={"optim.learning_rate": 1e-6},  # found
    ),
    # Weights of tokens. What each multiplies is that of the source where it says so.
    "iw_opd": Method(
        "2606.22600, as in TRL's experimental trainer",
        {
            "loss.token_weight": "iw",  # second-hand
            "loss.token_weight_on": "teacher",  # second-hand
            "loss.token_weight_strength": 0.5,  # second-hand
            "loss.aggregation": "token",  # second-hand
        },
        run={
            "optim.learning_rate": 1e-6,  # TRL's
            "rollout.top_p": 0.95,  # TRL's
        },
    ),
    "prune_opd": Method(
        "2605.07804, in two re-implementations; it also shortens later rollouts, by a rule not known here",
        {
            "loss.token_weight": "prune",  # second-hand
            "loss.token_weight_threshold": 0.9,  # second-hand; .7 in another config
            "loss.token_weight_drop": 0.02,  # second-hand; .01 in another config
            "loss.token_weight_least": 0.0,  # second-hand; .5 in another config
        },
    ),
    "sod": Method(
        "2605.07725, its code; that a step is a paragraph, or in `tiny` a window of tokens, is ours",
        {
            "loss.token_weight": "step",  # found
            "loss.token_weight_on": "teacher",  # found
            "loss.token_weight_strength": 0.2,  # found in the script; .5 in the code's defaults
            "loss.group_coef": 1.0,  # found
            "loss.clip_high": 0.28,  # found
        },
        run={
            "optim.learning_rate": 1e-6,  # found
            "rollout.prompts_per_step": 64,  # found
            "rollout.samples_per_prompt": 16,  # found
            "optim.updates_per_rollout": 4,  # found: minibatches of 16 prompts
        },
    ),
    "fire_opd": Method(
        "2606.02684, as an audit and a test describe its code",
        {
            "loss.token_weight": "fire",  # second-hand
            "loss.token_weight_strength": 1.0,  # second-hand
            "loss.token_weight_keep": 0.8,  # second-hand
        },
    ),
    "tip": Method(
        "2604.14084, in five notes",
        {
            "loss.token_weight": "tip",  # second-hand
            "loss.token_weight_keep": 0.5,  # second-hand
            "loss.token_weight_quantile": 1.0,  # second-hand: no clip; .98 in three notes
            "loss.aggregation": "token",  # second-hand: the mean over the tokens that are kept
        },
    ),
    "ta_opd": Method(
        "2605.26844, as an audit describes its code",
        {
            "loss.token_weight": "ta",  # second-hand
            "loss.token_weight_keep": 0.05,  # second-hand
            "loss.token_weight_quantile": 0.95,  # second-hand
            "loss.token_weight_top_k": 16,  # second-hand
        },
    ),
    "selectkd": Method(
        "2510.24021: its weights alone, on sampled OPD, as in an audit",
        {
            "loss.token_weight": "selectkd",  # second-hand
            "loss.token_weight_top_k": 5,  # second-hand
            "loss.token_weight_least": 0.01,  # second-hand
        },
    ),
    # Gates of rollouts.
    "rg_opd": Method(
        "2607.04037, Eq. 2, as an audit describes it",
        {
            "loss.rollout_gate": "agreement",  # second-hand
            "loss.rollout_gate_margin": 0.0,  # second-hand
        },
    ),
    "correct_opd": Method(
        "a control: the correct rollouts alone, an arm of the audit that read 2607.04037",
        {"loss.rollout_gate": "correct"},  # second-hand
    ),
    # The outcome of a rollout in the teacher's advantage.
    "uni_opd": Method(
        "2605.03677, its code (margin_shift.py) and scripts; without its balancing of rollouts",
        {
            "loss.outcome": "margin",  # found
            "loss.outcome_value": 0.4,  # found in the scripts
            "loss.advantage_clamp": 10.0,  # found in the scripts
            "loss.clip_high": 0.28,  # found in the scripts
        },
        run={
            "optim.learning_rate": 1e-6,  # found
            "rollout.prompts_per_step": 64,  # found
            "rollout.samples_per_prompt": 16,  # found
            "rollout.max_response_tokens": 16_384,  # found
        },
    ),
    "scope": Method(
        "2604.10688, Eqs. 2 to 6",
        {
            "loss.outcome": "route",  # found
            "loss.outcome_value": 1.0,  # found
        },
        run={
            "rollout.temperature": 0.6,  # found
            "rollout.max_response_tokens": 12_288,  # found
        },
    ),
    # Verifiable rewards, alone and with a teacher that is the student shown the solution.
    "grpo": Method("2402.03300", _REWARD, run=_LUFFY, teacher=NOBODY),
    "dr_grpo": Method(
        "2503.20783",
        _REWARD | {"loss.group_normalise": False, "loss.aggregation": "constant"},  # found
        run=_LUFFY,
        teacher=NOBODY,
    ),
    "rlsd": Method(
        "2604.03128, its README; Eqs. 13 to 16",
        _REWARD
        | {
            "loss.evidence_share": 0.5,  # found
            "loss.evidence_steps": 50,  # found; other configs of the authors have 30
            "loss.evidence_clip": 0.2,  # found
            "teacher.follow": "every",  # found: "synchronised every 10 steps"
            "teacher.every": 10,  # found
        },
        teacher=ITSELF,
    ),
    "rlrt": Method(
        "2605.10781: the ratio turned round, on correct rollouts",
        _REWARD
        | {
            "loss.evidence_away": True,  # second-hand
            "loss.evidence_correct_only": True,  # second-hand
            "loss.evidence_share": 0.5,  # unknown; that of RLSD
            "loss.evidence_clip": 0.2,  # unknown; that of RLSD
        },
        teacher=ITSELF,
    ),
    # Short rollouts, rollouts that grow, and fewer steps.
    "esr": Method(
        "2605.27028, as an audit and a test describe it; one list has 40 to 60 % of the length instead of N",
        {
            "rollout.max_response_tokens": 100,  # second-hand; 50 to 200 are alike
            "rollout.temperature": 0.7,  # second-hand
            "scoring.temperature": 0.7,  # inferred: the distribution that is sampled
            "loss.truncated": "keep",  # inferred: nearly every rollout is cut
        },
        run={"rollout.prompts_per_step": 16},  # second-hand; its learning rate is that of a LoRA
    ),
    "topd": Method("2605.31490: a tenth of the response budget", {}, horizon=(0.1,)),  # second-hand
    "popd": Method(
        "2605.31490, and Fast OPD, 2602.15260: the horizon grows by stairs",
        {"rollout.horizon_steps": 25},  # unknown
        horizon=(0.125, 0.25, 0.5, 1),  # unknown
    ),
    "length_curriculum": Method(
        "2605.16826: the horizon grows where the student's entropy allows it",
        {
            "rollout.horizon_steps": 5,  # unknown; 5 in a fork
            "rollout.horizon_entropy": 0.1,  # unknown
        },
        horizon=(0.125, 0.25, 0.5, 1),  # unknown; lengths from 128 to 4096 appear
    ),
    "kat": Method(
        "2606.09471, one full reading; here the tokens after the cut are sampled and left out of the loss",
        {
            "loss.low_kl_window": 64,  # second-hand
            "loss.low_kl_run": 4,  # second-hand
            "loss.low_kl_share": 0.3,  # second-hand
            "loss.low_kl_history": 4096,  # second-hand
            "loss.low_kl_rollouts": 512,  # second-hand
            "loss.low_kl_steps": 50,  # second-hand
        },
    ),
    "effopd": Method(
        "2605.11739; one note on it reads 2^k for 2 k",
        {
            "jump.problems": 50,  # found
            "jump.candidates": 5,  # found
            "optim.warmup_steps": 0,  # found; a warm-up makes the first directions short
            "optim.warmup_fraction": 0.0,  # found
        },
        run={
            "optim.learning_rate": 1e-6,  # found
            "rollout.prompts_per_step": 1024,  # found
            "rollout.samples_per_prompt": 1,  # found
            "rollout.max_response_tokens": 16_384,  # found
        },
    ),
    # A teacher that is the student with another prompt.
    "opsd": Method("2605.11182", {}, teacher=ITSELF),
    "opct": Method(
        "2605.21834; its code and a test",
        {
            # The student reads {problem}, the teacher another column of the same row; name yours by
            # --config.data.teacher_prompt_template={COLUMN}
            "data.teacher_prompt_template": "{clean}",
            "teacher.path": "student",  # second-hand
            "teacher.follow": "frozen",  # second-hand
            "loss.teacher_coef": 2.0,  # second-hand
            "loss.discount": 0.9,  # second-hand
        },
        run={
            "optim.learning_rate": 5e-6,  # second-hand; of a LoRA
            "rollout.temperature": 0.7,  # second-hand
            "rollout.samples_per_prompt": 4,  # second-hand
            "rollout.max_response_tokens": 2048,  # second-hand
        },
    ),
    "ophsd": Method(
        "2605.08741 and its code: the plan-then-solve harness",
        _DIVERGENCE
        | {
            "teacher.path": "student",  # found
            "teacher.follow": "frozen",  # found
            # Found: what the two prompts show; the words are ours.
            "harness.prompt": _PLAN,
            "data.teacher_prompt_template": _BY_PLAN,
            "eval.teacher": False,  # held-out problems have no plan
        },
        run={
            "harness.max_tokens": 4096,  # found
            "harness.max_prompt_tokens": 8192,  # unknown: problem and solution
            "optim.learning_rate": 1e-6,  # found
            "optim.weight_decay": 0.1,  # found
            "optim.updates_per_rollout": 2,  # found: 64 prompts in minibatches of 32
            "rollout.prompts_per_step": 64,  # found
            "rollout.samples_per_prompt": 1,  # found
            "rollout.temperature": 1.0,  # found
            "rollout.max_prompt_tokens": 4096,  # found
            "rollout.max_response_tokens": 8192,  # found
            "steps": 150,  # found
        },
    ),
}


def get_config(text: str | None = None) -> ConfigDict:
    """The config of `NAME[,RECIPE[,key=value...]]`."""
    name, *rest = (text or "").split(",")
    if name not in METHODS:
        raise ConfigError(
            f"method {name!r} is not known; {near(name, list(METHODS))}; give one such as "
            "--config=configs/methods.py:vopd"
        )
    method = METHODS[name]
    if not rest or "=" in rest[0]:
        rest = ["tiny", *rest]
    own_teacher = method.teacher in (ITSELF, NOBODY) or "teacher.path" in method.numbers
    config = recipes.recipe(",".join(rest), without=("teacher",) if own_teacher else ())
    small = rest[0] in _SMALL
    if method.teacher == ITSELF:
        config.teacher.path = "student"
        tiny = rest[0] == "tiny"  # its models have 512 positions, and a letter is a token to them
        shown = "{problem}\n{solution}" if tiny else recipes.PRIVILEGED
        config.data.teacher_prompt_template = shown
    elif method.teacher == NOBODY:
        config.teacher.path = ""
        config.data.teacher_prompt_template = config.data.teacher_system_prompt = "same"
        config.eval.teacher = False
    whole = config.rollout.max_response_tokens
    for field, value in {**method.numbers, **({} if small else method.run)}.items():
        section, _, last = field.rpartition(".")
        (config[section] if section else config)[last] = value
    _set_horizon(config, method, whole)
    if rest[0] == "tiny":
        _fit_tiny(config, name)
    _fit_memory(config)
    return config


def _set_horizon(config: ConfigDict, method: Method, whole: int) -> None:
    """Set the shorter budgets of rollouts; answers to held-out problems keep the recipe's `whole` budget."""
    rollout = config.rollout
    if method.horizon:
        *lower, last = (max(round(share * whole), 1) for share in method.horizon)
        rollout.horizon, rollout.max_response_tokens = tuple(lower), last
    if rollout.max_response_tokens < whole and (
        method.horizon or "rollout.max_response_tokens" in method.numbers
    ):
        config.eval.max_response_tokens = config.eval.max_response_tokens or whole


def _fit_tiny(config: ConfigDict, name: str) -> None:
    """What the generated problems and the small vocabulary of `tiny` need."""
    if config.loss.support != "full":
        config.loss.top_k = 4  # of 308 ids, 8 of which hold 99.99 % of the mass
    if config.loss.low_kl_window:
        config.loss.low_kl_window = 8  # its responses have about 60 tokens
    if config.loss.golden_support != "full":
        config.loss.golden_top_k = 4
    if config.sample.choose == "overlap":
        config.sample.choose_top_k = 4
    if config.loss.token_weight == "step":
        config.loss.token_weight_window = 8  # its solutions are one paragraph
    if config.rollout.samples_per_prompt == 8:
        config.rollout.prompts_per_step = 8  # as many rollouts a step as the other methods
    if config.harness.prompt:
        config.harness.prompt = "{problem}\n{solution}"
        config.data.teacher_prompt_template = "{problem}\n{plan}"
        config.harness.max_tokens = 64
    if name == "opct" and config.data.train == "tiny:train":
        # Generated problems have no other column: the student reads a hint that may be wrong.
        config.data.prompt_template = "I think 7. {problem}"
        config.data.teacher_prompt_template = "{problem}"
        config.rollout.max_prompt_tokens = 56


def _fit_memory(config: ConfigDict) -> None:
    """A micro-batch that holds the longest row, and not all rollouts of a large step at one time."""
    row = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    config.optim.microbatch_tokens = max(config.optim.microbatch_tokens, row)
    if config.rollout.prompts_per_step * config.rollout.samples_per_prompt > 512:
        config.rollout.slots = 512
