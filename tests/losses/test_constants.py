"""What the papers call a constant has no gradient: every function of the package, argument by argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses

P, Q = (np.log(np.array([[x]], np.float32)) for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
TOKEN_P, TOKEN_Q = P[..., 0], Q[..., 0]
PAIR = {"p_logprob_BTV": P, "q_logprob_BTV": Q}
# Function: its arguments, and those of them that are constants; all of an advantage's are.
CASES = {
    "clipped_surrogate": (
        {
            "logprob_BT": TOKEN_P, "sampler_logprob_BT": TOKEN_P + 0.1, "advantage_BT": TOKEN_P + 3.0,
            "clip_low": 0.2, "clip_high": 0.2,
        },
        ("sampler_logprob_BT", "advantage_BT"),
    ),
    "discounted": ({"reward_BT": TOKEN_P, "discount": 0.5}, ("reward_BT",)),
    "divergence": (
        PAIR | {
            "direction": "jsd", "share": 0.5, "form": "tail", "p_rest_BT": TOKEN_P, "q_rest_BT": TOKEN_Q,
        },
        ("q_logprob_BTV", "q_rest_BT"),
    ),
    "entropy": ({"logprob_BTV": P}, ()),
    "evidence_weight": (
        {
            "teacher_logprob_BT": TOKEN_Q, "student_logprob_BT": TOKEN_P,
            "group_B": np.ones(len(TOKEN_P), np.float32), "clip": 0.9, "share": 0.5,
        },
        ("teacher_logprob_BT", "student_logprob_BT", "group_B"),
    ),
    "exact_kl": (PAIR, ("q_logprob_BTV",)),
    "extrapolated": (
        {"teacher_logprob_BT": TOKEN_Q, "reference_logprob_BT": TOKEN_P, "extrapolation": 1.5},
        ("teacher_logprob_BT", "reference_logprob_BT"),
    ),
    "forward_kl": (PAIR, ("q_logprob_BTV",)),
    "generalised_jsd": (PAIR | {"beta": 0.5}, ("q_logprob_BTV",)),
    "group_advantage": (
        {"reward_B": np.array([1.0, 2.0, 0.5, 0.0], np.float32), "group": 2, "normalise": True},
        ("reward_B",),
    ),
    "kl_k1": ({"logprob_BT": TOKEN_P, "reference_logprob_BT": TOKEN_Q}, ("reference_logprob_BT",)),
    "kl_k2": ({"logprob_BT": TOKEN_P, "reference_logprob_BT": TOKEN_Q}, ("reference_logprob_BT",)),
    "kl_k3": ({"logprob_BT": TOKEN_P, "reference_logprob_BT": TOKEN_Q}, ("reference_logprob_BT",)),
    "mixed_kl": (PAIR | {"share": 0.3}, ("q_logprob_BTV",)),
    "opd_advantage": (
        {"teacher_logprob_BT": TOKEN_Q, "student_logprob_BT": TOKEN_P},
        ("teacher_logprob_BT", "student_logprob_BT"),
    ),
    "renormalised": ({"logprob_BTX": P}, ()),
    "sft_nll": ({"logprob_BT": TOKEN_P}, ()),
    "shaped": (
        {
            "teacher_logprob_BT": TOKEN_Q, "student_logprob_BT": TOKEN_P, "reverse_kl_BT": TOKEN_P,
            "shape": "baseline",
        },
        ("teacher_logprob_BT", "student_logprob_BT", "reverse_kl_BT"),
    ),
    "skewed_forward_kl": (PAIR | {"skew": 0.1}, ("q_logprob_BTV",)),
    "skewed_reverse_kl": (PAIR | {"skew": 0.1}, ("q_logprob_BTV",)),
    "stop_gradient_reverse_kl": (PAIR, ("q_logprob_BTV",)),
    "support_advantage": (
        {"student_logprob_BTX": P, "teacher_logprob_BTX": Q, "weight": "student"},
        ("student_logprob_BTX", "teacher_logprob_BTX"),
    ),
    "truncated_importance": (
        {"logprob_BT": TOKEN_P, "sampler_logprob_BT": TOKEN_P + 0.1, "cap": 2.0},
        ("logprob_BT", "sampler_logprob_BT"),
    ),
    "with_rest": ({"logprob_BTX": P, "rest_BT": TOKEN_P}, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_constants_have_no_gradient_and_all_else_has(name):
    arguments, constants = CASES[name]

    def total(arrays):
        return jnp.sum(getattr(losses, name)(**arguments | arrays) ** 2)

    arrays = {k: jnp.asarray(v) for k, v in arguments.items() if isinstance(v, np.ndarray)}
    gradient = jax.jit(jax.grad(total))(arrays)
    for argument, slope in gradient.items():
        assert bool(jnp.any(slope != 0)) == (argument not in constants), argument


def test_every_function_of_the_package_is_here():
    functions = {name for name in losses.__all__ if name.islower()}
    # The mask of the first is of booleans, and the others are about the number of a step.
    assert functions - {"token_weights", "share_at", "annealed"} == CASES.keys()
