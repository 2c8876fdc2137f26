"""Advantages of the surrogate, for each sampled token or for each id of a support. All are constants."""

import jax
import jax.numpy as jnp

from opd_jax.shapes import check_shapes

SUPPORT_WEIGHTS = ("student", "teacher", "uniform")


def opd_advantage(*, teacher_logprob_BT: jax.Array, student_logprob_BT: jax.Array) -> jax.Array:
    """A_t = log q(y_t|s_t) - log p(y_t|s_t), a constant. [B, T]. (2604.08527, reward and advantage)

    No normalisation, discount or group baseline: its mean over rollouts is -KL(p || q).
    """
    check_shapes(teacher_logprob_BT=teacher_logprob_BT, student_logprob_BT=student_logprob_BT)
    return jax.lax.stop_gradient(teacher_logprob_BT - student_logprob_BT)


@jax.jit
def discounted(*, reward_BT: jax.Array, discount: float) -> jax.Array:
    """A_t = sum_{t' >= t} discount^(t' - t) r_t' of each row. [B, T]. (2603.25562; tinker-cookbook)

    `reward_BT` is 0 where no token counts. discount = 0 is the token's own reward (variance ~ T^2),
    1 the whole return (~ T^4).
    """

    def step(later_B: jax.Array, reward_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (now_B := reward_B + discount * later_B), now_B

    reward_BT = jax.lax.stop_gradient(reward_BT)
    _, return_TB = jax.lax.scan(step, jnp.zeros_like(reward_BT[:, 0]), reward_BT.T, reverse=True)
    return return_TB.T


def group_advantage(
    *, reward_B: jax.Array, group: int, normalise: bool, counted_B: jax.Array | None = None
) -> jax.Array:
    """(r_i - mean r) / (std r + 1e-6) over the `group` rollouts of a prompt, which are adjacent rows. [B].

    GRPO (2402.03300), Eq. (1) of 2604.08527; `normalise` = False omits the division: Dr.GRPO
    (2503.20783). The standard deviation is the unbiased one, as in verl. A constant.

    Mean and deviation are taken over the rollouts in `counted_B` (bool [B]; None = all); the others
    get 0, as does every rollout of a group in which fewer than two count. Rewards are measured from
    the least of their group, so equal ones give exactly 0, however their mean would round.
    """
    counted_B = jnp.ones(reward_B.shape, bool) if counted_B is None else counted_B
    reward_PG, counted_PG = reward_B.reshape(-1, group), counted_B.reshape(-1, group)
    count_P1 = jnp.sum(counted_PG, axis=1, keepdims=True, dtype=reward_B.dtype)

    def mean(x_PG: jax.Array, count_P1: jax.Array) -> jax.Array:
        return jnp.sum(x_PG, axis=1, keepdims=True) / jnp.maximum(count_P1, 1.0)

    least_P1 = jnp.min(reward_PG, axis=1, keepdims=True, where=counted_PG, initial=jnp.inf)
    above_PG = jnp.where(counted_PG, reward_PG - least_P1, 0.0)
    centred_PG = jnp.where(counted_PG, above_PG - mean(above_PG, count_P1), 0.0)
    if normalise:
        centred_PG /= jnp.sqrt(mean(centred_PG**2, count_P1 - 1.0)) + 1e-6
    return jax.lax.stop_gradient(centred_PG.reshape(-1))


def extrapolated(
    *, teacher_logprob_BT: jax.Array, reference_logprob_BT: jax.Array, extrapolation: float
) -> jax.Array:
    """log q'(y_t) = log ref(y_t) + lambda (log q(y_t) - log ref(y_t)): the teacher moved along its change.

    lambda = `extrapolation`. G-OPD and ExOPD, 2602.12125 (second-hand, three sources agree): the advantage
    lambda (log q - log ref) - (log p - log ref) = l_t + (lambda - 1) (log q - log ref) is the log-ratio of q'
    and p. lambda = 1 is OPD, lambda in (0, 1) interpolates between reference and teacher, lambda > 1 goes
    past the teacher (1.25 in ExOPD). Fixed point per prefix (inferred): the maximiser of
    lambda E_p[log q / ref] - KL(p || ref), that is pi*(v) proportional to ref(v)^(1 - lambda) q(v)^lambda.
    q' is not normalised, so only shapes of the log-ratio alone fit it. A constant; [B, T].

    Far above 1 the fixed point can leave the teacher's format ("extrapolation cliff", 2605.08737). The
    formula of its threshold is not known, so nothing here computes it.
    """
    check_shapes(teacher_logprob_BT=teacher_logprob_BT, reference_logprob_BT=reference_logprob_BT)
    gain_BT = teacher_logprob_BT - reference_logprob_BT
    return jax.lax.stop_gradient(teacher_logprob_BT + (extrapolation - 1.0) * gain_BT)


def evidence_weight(
    *,
    teacher_logprob_BT: jax.Array,
    student_logprob_BT: jax.Array,
    group_B: jax.Array,
    clip: float,
    share: float,
    away: bool = False,
    correct_only: bool = False,
) -> jax.Array:
    """(1 - share) + share clip(exp(sign(A) l_t), 1 - clip, 1 + clip): multiplies the group's advantage A.

    RLSD, 2604.03128 (found in its README; equations second-hand, four sources agree): the reward of the
    group gives the direction of each token's update, and the teacher, which is the student shown the
    solution, only moves its size, by `clip` at most. In a correct rollout a token that the teacher likes
    better gets more, in an incorrect one less. share = 0 is the group's advantage itself, bit for bit.

    `away` turns the ratio round: exp(-sign(A) l_t), RLRT, 2605.10781 (second-hand), which gives more to what
    the student found without the solution; `correct_only` limits the weight to rollouts with A > 0, where
    that paper uses it. The clip acts on logarithms: nothing can overflow. A constant; [B, T].
    """
    check_shapes(teacher_logprob_BT=teacher_logprob_BT, student_logprob_BT=student_logprob_BT)
    sign_B1 = jnp.sign(group_B)[:, None] * (-1.0 if away else 1.0)
    low, high = jnp.log1p(-clip), jnp.log1p(clip)
    ratio_BT = jnp.exp(jnp.clip(sign_B1 * (teacher_logprob_BT - student_logprob_BT), low, high))
    weight_BT = (1.0 - share) + share * ratio_BT
    if correct_only:
        weight_BT = jnp.where(group_B[:, None] > 0, weight_BT, 1.0)
    return jax.lax.stop_gradient(weight_BT)


def share_at(step: int, *, share: float, steps: int) -> float:
    """Return the share of `evidence_weight` at step 1, 2, ...: `share` at first, 0 from step `steps` + 1.

    It falls linearly, as in RLSD (.5 over 50 steps); `steps` = 0 keeps it constant.
    """
    return share * max(0.0, 1.0 - (step - 1) / steps) if steps else share


def truncated_importance(
    *, logprob_BT: jax.Array, sampler_logprob_BT: jax.Array, cap: float
) -> jax.Array:
    """min(p_old(y_t) / p_sampler(y_t), cap), a constant weight of each token. [B, T].

    Token-level truncated importance sampling. p_old is the scorer's and p_sampler the sampler's
    probability under the same weights; they differ by rounding and kernels. The weight multiplies the
    advantage, in which the surrogate is linear.
    """
    check_shapes(logprob_BT=logprob_BT, sampler_logprob_BT=sampler_logprob_BT)
    ratio_BT = jnp.exp(logprob_BT - sampler_logprob_BT)
    return jax.lax.stop_gradient(jnp.minimum(ratio_BT, cap))


def support_advantage(
    *,
    student_logprob_BTX: jax.Array,
    teacher_logprob_BTX: jax.Array,
    weight: str,
    normalise: bool = True,
) -> jax.Array:
    """A_t(v) = w_t(v) (log q(v) - log p(v)) for each id of a support, a constant. [B, T, X].

    This is "top-k" in the code of 2604.13016: log-probs are those of the full vocabulary; w are the student's
    or the teacher's probabilities, or uniform, renormalised over the support unless `normalise` is False (as
    in that code for the symmetric difference). In the surrogate over every id it has the gradient
    -sum_v w(v) (log q - log p) grad log p(v) at ratio 1, which is not that of any renormalised KL. Ids
    outside the support (-inf) get 0.
    """
    check_shapes(student_logprob_BTX=student_logprob_BTX, teacher_logprob_BTX=teacher_logprob_BTX)
    member = student_logprob_BTX > -jnp.inf
    log_p, log_q = (jnp.where(member, x, 0.0) for x in (student_logprob_BTX, teacher_logprob_BTX))
    basis = {"student": log_p, "teacher": log_q, "uniform": jnp.zeros_like(log_p)}[weight]
    basis = jnp.where(member, basis, -1e30)
    w_BTX = jax.nn.softmax(basis, axis=-1) if normalise else jnp.exp(basis)
    return jax.lax.stop_gradient(jnp.where(member, w_BTX * (log_q - log_p), 0.0))
