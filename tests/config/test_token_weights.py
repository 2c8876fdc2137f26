"""Numbers and combinations of token weights and gates that are refused, each in one line with its mend."""

import pytest

from configs import grpo, opd
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError

pytestmark = pytest.mark.short

FORWARD = {"divergence_weight": 1.0, "direction": "forward", "support": "teacher"}
EOPD = FORWARD | {"form": "teacher_renormalised", "gate": "entropy", "gate_threshold": 0.8}
AOPD = FORWARD | {"gate": "advantage"}


def config_of(changes: dict, samples: int = 4):
    config = opd.get_config()
    config.loss.update(changes)
    config.rollout.samples_per_prompt = samples
    return config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token_weight": "tips"}, "set --config.loss.token_weight=tip"),
        ({"token_weight": "tip", "token_weight_keep": 0.0}, "above 0 to 1"),
        ({"token_weight": "tip", "token_weight_keep": 1.1}, "above 0 to 1"),
        ({"token_weight": "tip", "token_weight_quantile": 0.5}, "above 0.5 to 1"),
        ({"token_weight": "prune", "token_weight_threshold": 1.5}, "0 to 1"),
        ({"token_weight": "prune", "token_weight_drop": -0.1}, "0 to 1"),
        ({"token_weight": "prune", "token_weight_least": -1.0}, "at least 0"),
        ({"token_weight": "iw", "token_weight_strength": -1.0}, "at least 0"),
        ({"token_weight": "ta", "token_weight_top_k": 0}, "at least 1"),
        ({"token_weight": "step", "token_weight_window": -1}, "at least 0"),
        ({"token_weight": "iw", "token_weight_on": "surogate"}, "one of teacher, all"),
        ({"rollout_gate": "agreemnt"}, "set --config.loss.rollout_gate=agreement"),
        ({"rollout_gate": "agreement", "rollout_gate_margin": -1.0}, "at least 0"),
        (EOPD | {"gate": "entropie"}, "set --config.loss.gate=entropy"),
        (EOPD | {"gate_threshold": -2.0}, "at least -1"),
        (FORWARD | {"direction": "mixture", "reverse_share": 1.5}, "0 to 1"),
        (FORWARD | {"direction": "mixtur"}, "set --config.loss.direction=mixture"),
        # what nothing reads
        ({"token_weight_keep": 0.1}, "token_weight=none does not read it; leave it at 0.5, or set "
         "--config.loss.token_weight=tip"),
        ({"token_weight": "iw", "token_weight_drop": 0.1}, "token_weight=iw does not read it"),
        ({"token_weight_on": "teacher"}, "set --config.loss.token_weight=iw"),
        ({"rollout_gate_margin": 1.0}, "--config.loss.rollout_gate=agreement"),
        (FORWARD | {"reverse_share": 0.1}, "--config.loss.direction=mixture"),
        (FORWARD | {"gate": "acceptance", "gate_threshold": 0.5}, "acceptance has no threshold"),
        # gates without a forward term
        ({"gate": "acceptance"}, "loss.divergence_weight=0; leave it at none, or set "
         "--config.loss.divergence_weight=1"),
        (AOPD | {"direction": "reverse"}, "set --config.loss.direction=forward"),
        (AOPD | {"direction": "skewed_reverse"}, "set --config.loss.direction=forward"),
        (AOPD | {"support": "student"}, "set --config.loss.support=teacher"),
        (AOPD | {"support": "intersection"}, "set --config.loss.support=teacher"),
        (AOPD | {"support": "symmetric_difference"}, "set --config.loss.support=teacher"),
        # gates that are open or closed everywhere
        (EOPD | {"gate_threshold": 0.0}, "set --config.loss.gate_threshold=0.8"),
        (AOPD | {"gate_threshold": 1.0}, "set --config.loss.gate_threshold=0"),
        (AOPD | {"gate_threshold": -1.0}, "set --config.loss.gate_threshold=0"),
        (EOPD | {"direction": "reverse", "gate": "none", "gate_threshold": 0.0},
         "set --config.loss.direction=forward"),
        # a factor without a term of the teacher
        ({"token_weight": "fire", "teacher_coef": 0.0, "group_coef": 1.0},
         "--config.loss.teacher_coef=1"),
        ({"token_weight": "tip", "token_weight_on": "teacher", "pg_weight": 0.0,
          "divergence_weight": 1.0}, "--config.loss.pg_weight=1"),
        ({"rollout_gate": "agreement", "teacher_coef": 0.0, "group_coef": 1.0},
         "set --config.loss.teacher_coef=1, or --config.loss.rollout_gate=correct"),
    ],
)  # fmt: skip
def test_refused_in_one_line(changes, says):
    with pytest.raises(ConfigError) as error:
        validate(config_of(changes))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rollout_is_compared_with_others_of_its_prompt():
    with pytest.raises(ConfigError, match=r"set --config\.rollout\.samples_per_prompt=4"):
        validate(config_of({"rollout_gate": "agreement"}, samples=1))
    validate(config_of({"rollout_gate": "correct"}, samples=1))


@pytest.mark.parametrize("rule", ["token_weight", "rollout_gate"])
def test_a_teacher_is_asked_for(rule):
    config = config_of({rule: {"token_weight": "fire", "rollout_gate": "agreement"}[rule]})
    config.teacher.path = ""
    with pytest.raises(ConfigError, match=r"teacher\.path=''"):
        validate(config)


@pytest.mark.parametrize(
    "changes",
    [
        EOPD, AOPD, AOPD | {"gate_threshold": -0.1}, FORWARD | {"gate": "acceptance"},
        FORWARD | {"gate": "acceptance", "support": "full"}, AOPD | {"support": "union"},
        FORWARD | {"direction": "mixture", "reverse_share": 0.0},
        AOPD | {"direction": "jsd", "jsd_beta": 0.3},
        {"token_weight": "ta", "token_weight_keep": 0.05, "token_weight_quantile": 0.95},
        {"token_weight": "iw", "rollout_gate": "agreement"},
    ],
)  # fmt: skip
def test_allowed(changes):
    validate(config_of(changes))


def test_rewards_alone_may_leave_out_wrong_rollouts():
    config = grpo.get_config()
    config.loss.rollout_gate = "correct"
    validate(config)
