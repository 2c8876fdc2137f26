"""Gates: which tokens have a second direction of the divergence, and which rollouts are distilled.

NumPy, on the host, all constants. A gate g_t of 0 or 1 multiplies the divergence of its token. Where it
replaces the surrogate, the surrogate has the factor 1 - g_t; where it adds to it, the factor 1. Marks as in
token_factors.py.
"""

import jax
import numpy as np

GATES = ("none", "entropy", "advantage", "acceptance")
REPLACING = ("advantage", "acceptance")  # the others add
ROLLOUT_GATES = ("none", "correct", "agreement")


def entropy_gate(
    *, teacher_entropy_BT: np.ndarray, mask_BT: np.ndarray, threshold: float
) -> np.ndarray:
    """g_t = [H(q_t) >= threshold], H in nats over the full vocabulary. [B, T].

    EOPD (2603.07079, threshold .8), found in its code: a forward KL is added where the teacher is unsure.
    The mean is over all counted tokens, not over the open ones.
    """
    return (mask_BT & (teacher_entropy_BT >= threshold)).astype(np.float32)


def advantage_gate(
    *,
    teacher_logprob_BT: np.ndarray,
    student_logprob_BT: np.ndarray,
    mask_BT: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """g_t = [not q(y_t) - p(y_t) > threshold], in probability. [B, T].

    AOPD (2605.06387), second-hand (4), threshold 0: the forward KL takes the place of the surrogate where
    the teacher does not like the token more than the student does. -1 is always 0 (plain OPD), 1 always 1
    (GKD). One source opens the gate where p - q > .1 instead: threshold -.1 (equality apart).
    """
    difference_BT = np.exp(teacher_logprob_BT) - np.exp(student_logprob_BT)
    closed_BT = (difference_BT > threshold) | (threshold <= -1)  # exp(-inf) - 1 is not above -1
    return (mask_BT & ~closed_BT).astype(np.float32)


def acceptance_gate(
    *,
    teacher_logprob_BT: np.ndarray,
    student_logprob_BT: np.ndarray,
    mask_BT: np.ndarray,
    uniform_BT: np.ndarray,
) -> np.ndarray:
    """g_t = 1 - M_t, M_t ~ Bernoulli(min(q(y_t) / p(y_t), 1)), drawn as [u_t < q / p]. [B, T].

    TrOPD (2606.01249), second-hand (3): a token that speculative decoding would accept keeps the surrogate,
    the forward KL takes the place of it on the others. `uniform_BT` has draws from [0, 1), see `uniforms`.
    """
    ratio_BT = np.exp(np.minimum(teacher_logprob_BT - student_logprob_BT, 0.0))
    return (mask_BT & (uniform_BT >= ratio_BT)).astype(np.float32)


def uniforms(key: jax.Array, *, rows: int, width: int) -> np.ndarray:
    """Return a number from [0, 1) for every token, each row from a key of its own. float32 [B, T]."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))
    return np.asarray(jax.vmap(lambda one: jax.random.uniform(one, (width,)))(keys_B))


def agreement_gate(
    *,
    teacher_logprob_BT: np.ndarray,
    student_logprob_BT: np.ndarray,
    mask_BT: np.ndarray,
    group_B: np.ndarray,
    margin: float,
) -> np.ndarray:
    """Return the rollouts on which the teacher agrees with the reward; bool [B].

    RG-OPD (2607.04037, Eq. 2, margin 0), second-hand (1). With L the log-likelihood of the rollout and A its
    group advantage `group_B`: L_T > L_S + margin where A > 0, and L_T < L_S - margin where A <= 0.
    """
    difference_BT = np.where(mask_BT, teacher_logprob_BT - student_logprob_BT, 0.0)
    difference_B = np.sum(difference_BT, axis=1, dtype=float)
    return np.where(group_B > 0, difference_B > margin, difference_B < -margin)
