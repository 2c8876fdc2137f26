"""Factors of a token's weight in the loss, one published rule each. NumPy, on the host, all constants.

`gap` is |log q(y_t) - log p(y_t)|, `mask` marks the tokens that count, and every factor is 0 outside it. A
factor multiplies the teacher's advantage, or the token's weight in all terms; `rescaled` then keeps the sum
of the weights, so that a rule which keeps few tokens is not a change of the learning rate. The sources do
not all rescale. Marks: "found" in the paper or its code; "second-hand (n)" in n independent notes or
re-implementations; "inferred" here.
"""

import numpy as np

# The name in the config: the function below.
TOKEN_WEIGHTS = ("none", "iw", "prune", "step", "fire", "tip", "ta", "selectkd")
WEIGHTED = ("teacher", "all")
_TINY = 1e-8


def rescaled(factor_BT: np.ndarray, weight_BT: np.ndarray) -> np.ndarray:
    """factor * sum weight / sum (weight factor): the weighted sum of the factors is that of ones. [B, T].

    Factors whose weighted sum is 0 stay 0. A factor that is the same on every token with a weight becomes
    exactly 1 there.
    """
    counted_BT = weight_BT > 0
    inside = factor_BT[counted_BT]
    if inside.size and np.all(inside == inside[0]) and inside[0] > 0:
        return np.where(counted_BT, 1.0, 0.0).astype(np.float32)
    total = np.sum(weight_BT * np.where(counted_BT, factor_BT, 0.0), dtype=float)
    scale = np.sum(weight_BT, dtype=float) / total if total > 0 else 0.0
    return np.where(counted_BT, factor_BT * scale, 0.0).astype(np.float32)


def early_agreement(*, gap_BT: np.ndarray, mask_BT: np.ndarray, strength: float) -> np.ndarray:
    """w_t = 1 + strength (1 - sum_{j<t} gap_j / sum_j gap_j): 1 + strength at first, falling to 1. [B, T].

    IW-OPD (2606.22600, with strength .5), second-hand (2, exact): a token counts less the more the student
    has left the teacher before it. In a row without any gap every factor is 1 + strength.
    """
    gap_BT = np.where(mask_BT, gap_BT, 0.0)
    before_BT = np.cumsum(gap_BT, axis=1) - gap_BT
    total_B1 = np.maximum(np.sum(gap_BT, axis=1, keepdims=True), _TINY)
    return np.where(mask_BT, 1.0 + strength * (1.0 - before_BT / total_B1), 0.0)


def pruned(
    *, overlap_BT: np.ndarray, mask_BT: np.ndarray, threshold: float, drop: float, least: float
) -> np.ndarray:
    """w_t = clip(1 - drop sum_{j<=t} [overlap_j < threshold], 0, 1) + least. [B, T].

    Prune-OPD (2605.07804, with .9, .02, 0), second-hand (2, exact): overlap is the share of the student's
    top-k that is in the teacher's (`scoring.overlap_top_k`). The paper also shortens later rollouts, by a
    rule that is not known here.
    """
    bad_BT = mask_BT & (overlap_BT < threshold)
    kept_BT = np.clip(1.0 - drop * np.cumsum(bad_BT, axis=1), 0.0, 1.0)
    return np.where(mask_BT, kept_BT + least, 0.0)


def step_weights(
    *, gap_BT: np.ndarray, step_BT: np.ndarray, mask_BT: np.ndarray, strength: float
) -> np.ndarray:
    """w_k = min((d_1 + 1e-6) / (d_k + 1e-6), 1 + strength), w_1 = 1; d_k the mean gap of step k. [B, T].

    SOD (2605.07725; strength .2, the code's default is .5), found in its code, where steps are the spans
    between tool calls. `step_BT` numbers the step of each token, -1 outside. Only tokens of the mask enter a
    mean, and the first step is the first that has one.
    """
    out_BT = np.zeros(mask_BT.shape)
    for row, inside_T in enumerate(mask_BT & (step_BT >= 0)):
        if not inside_T.any():
            continue
        _, index, count = np.unique(step_BT[row, inside_T], return_inverse=True, return_counts=True)
        mean = np.bincount(index, weights=gap_BT[row, inside_T]) / count
        weight = np.minimum((mean[0] + 1e-6) / (mean + 1e-6), 1.0 + strength)
        weight[0] = 1.0
        out_BT[row, inside_T] = weight[index]
    return out_BT


def likeliest_rows(
    *, teacher_logprob_BT: np.ndarray, mask_BT: np.ndarray, keep: float
) -> np.ndarray:
    """Return the rollouts without the share 1 - keep whose mean log q is least; bool [B].

    FiRe (2606.02684, keep .8), second-hand (2, exact). Of n rollouts with a token in the mask
    floor((1 - keep) n) are dropped; of equal ones the later.
    """
    length_B = np.sum(mask_BT, axis=1)
    total_B = np.sum(np.where(mask_BT, teacher_logprob_BT, 0.0), axis=1)
    mean_B = np.where(length_B > 0, total_B / np.maximum(length_B, 1), -np.inf)
    count = int(np.sum(length_B > 0))
    kept = count - int((1.0 - keep) * count + 1e-9)
    order_B = np.argsort(-mean_B, kind="stable")
    chosen_B = np.zeros(len(mean_B), bool)
    chosen_B[order_B[:kept]] = True
    return chosen_B


def entropy_factors(
    *,
    teacher_entropy_BT: np.ndarray,
    student_entropy_BT: np.ndarray,
    mask_BT: np.ndarray,
    teacher_strength: float,
    student_strength: float,
) -> np.ndarray:
    """(1 + a (1 - H(q_t) / max H(q))) (1 + b H(p_t) / max H(p)), divided by its mean over the mask. [B, T].

    FiRe (2606.02684, a = b = 1), second-hand (2, exact): more weight where the teacher is sure and the
    student is not. The mean is over all counted tokens, as in the code (the paper: of each rollout).
    """
    if not mask_BT.any():
        return np.zeros(mask_BT.shape)
    sure_BT = 1.0 - _of_largest(teacher_entropy_BT, mask_BT)
    unsure_BT = _of_largest(student_entropy_BT, mask_BT)
    factor_BT = (1.0 + teacher_strength * sure_BT) * (1.0 + student_strength * unsure_BT)
    return np.where(mask_BT, factor_BT / np.mean(factor_BT[mask_BT]), 0.0)


def uncertain_or_far(
    *,
    entropy_BT: np.ndarray,
    divergence_BT: np.ndarray,
    mask_BT: np.ndarray,
    quantile: float = 1.0,
) -> np.ndarray:
    """s_t = h + d - h d: student entropy and KL(p || q), each scaled to 0 .. 1 over the mask. [B, T].

    TIP's score (2604.14084), second-hand (5); `most` then selects the tokens. Whether h is clipped at its
    98th percentile first is a conflict of the sources: `quantile` (1 = no clip).
    """
    if not mask_BT.any():
        return np.zeros(mask_BT.shape)
    entropy_BT = np.minimum(entropy_BT, np.quantile(entropy_BT[mask_BT], quantile))
    h_BT = _between(entropy_BT, mask_BT, 0.0, 1.0)
    d_BT = _between(divergence_BT, mask_BT, 0.0, 1.0)
    return np.where(mask_BT, h_BT + d_BT - h_BT * d_BT, 0.0)


def far_and_compatible(
    *,
    divergence_BT: np.ndarray,
    teacher_mass_BT: np.ndarray,
    mask_BT: np.ndarray,
    quantile: float = 0.95,
) -> np.ndarray:
    """Disagreement times compatibility, each clip((z - Q_{1-x}) / (Q_x - Q_{1-x}), 0, 1). [B, T].

    TA-OPD's score (2605.26844), second-hand (1), x = .95; `most` then selects the tokens. Compatibility is
    the teacher's mass on the student's top-16 ids; that disagreement is KL(p || q) is inferred.
    """
    if not mask_BT.any():
        return np.zeros(mask_BT.shape)
    far_BT = _between(divergence_BT, mask_BT, 1.0 - quantile, quantile)
    compatible_BT = _between(teacher_mass_BT, mask_BT, 1.0 - quantile, quantile)
    return np.where(mask_BT, far_BT * compatible_BT, 0.0)


def most(*, score_BT: np.ndarray, mask_BT: np.ndarray, keep: float) -> np.ndarray:
    """1 on the share `keep` of the tokens of the mask with the largest scores, else 0. [B, T].

    ceil(keep n) of n tokens are kept, so at least one; of equal scores those of the earlier row and token.
    TIP keeps .5 and TA-OPD .05.
    """
    place = np.flatnonzero(mask_BT)
    count = int(np.ceil(keep * len(place) - 1e-9))
    order = np.argsort(-score_BT.reshape(-1)[place], kind="stable")
    out = np.zeros(mask_BT.size)
    out[place[order[:count]]] = 1.0
    return out.reshape(mask_BT.shape)


def accepted(*, accepted_BT: np.ndarray, mask_BT: np.ndarray, least: float) -> np.ndarray:
    """1 where the student's likeliest id is among the teacher's top k, else `least`. [B, T].

    SelecTKD (2510.24021, k 5, least .01), second-hand (1).
    """
    return np.where(mask_BT, np.where(accepted_BT > 0, 1.0, least), 0.0)


def _of_largest(values_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """values / their largest in the mask; 0 where that is 0."""
    largest = np.max(values_BT[mask_BT])
    return values_BT / largest if largest > 0 else np.zeros(values_BT.shape)


def _between(values_BT: np.ndarray, mask_BT: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale two quantiles of the mask's values to 0 and 1 and clip; all 0 where they are equal."""
    first, last = np.quantile(values_BT[mask_BT], (low, high))
    if not last > first:
        return np.zeros(values_BT.shape)
    return np.clip((values_BT - first) / (last - first), 0.0, 1.0)
