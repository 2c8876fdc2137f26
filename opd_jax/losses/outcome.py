"""How the outcome of a rollout, correct or not, changes the teacher's advantage of its tokens.

NumPy, on the host, all constants. Rollouts of a prompt are `group` adjacent rows. `correct_B` is read only
in `known_B`, the rollouts with a grade and with a counted token; the others are in no mean and no sum.
"""

import numpy as np

OUTCOMES = ("none", "margin", "route")


def margin_shift(
    *, mean_B: np.ndarray, correct_B: np.ndarray, known_B: np.ndarray, group: int, margin: float
) -> np.ndarray:
    """+s / 2 for correct rollouts and -s / 2 for the others, s = max(margin - gap, 0). float32 [B].

    gap is the mean of `mean_B`, each rollout's mean advantage, over the correct rollouts of a prompt, less
    that over the others; the shift is added to the advantage of every token, so that the gap is at least
    the margin. Uni-OPD (2605.03677, margin .4), found in its code: margin_shift.py, and the scripts, which
    choose the prompt's group, means, and both sides. A prompt with one kind of outcome has no shift. The
    paper's balancing of the rollouts of a step is not part of this.
    """
    shape = (-1, group)
    right_PG = (known_B & correct_B).reshape(shape)
    wrong_PG = (known_B & ~correct_B).reshape(shape)
    mean_PG = np.where(known_B, mean_B, 0.0).astype(float).reshape(shape)

    def mean(member_PG: np.ndarray) -> np.ndarray:
        total_P1 = np.sum(np.where(member_PG, mean_PG, 0.0), axis=1, keepdims=True)
        return total_P1 / np.maximum(np.sum(member_PG, axis=1, keepdims=True), 1)

    both_P1 = right_PG.any(axis=1, keepdims=True) & wrong_PG.any(axis=1, keepdims=True)
    short_P1 = np.maximum(margin - (mean(right_PG) - mean(wrong_PG)), 0.0)
    shift_PG = np.where(both_P1, 0.5 * short_P1, 0.0) * (right_PG * 1.0 - wrong_PG)
    return shift_PG.reshape(-1).astype(np.float32)


def route_weights(
    *,
    student_mean_B: np.ndarray,
    teacher_mean_B: np.ndarray,
    correct_B: np.ndarray,
    known_B: np.ndarray,
    group: int,
    temperature: float,
) -> np.ndarray:
    """Weights by perplexity, which sum to `group` over each outcome of a prompt. float32 [B].

    Of the correct rollouts w is proportional to PPL_p^(1/tau), so that the student's unlikely ways to the
    answer count more; of the others to PPL_q^(-1/tau), so that prefixes in which the teacher is lost count
    less. tau = `temperature`, PPL = exp(-mean log-prob), of the means `student_mean_B`, `teacher_mean_B`.

    SCOPE (2604.10688, tau 1), Eqs. 4 and 5, found in the paper. There the weights of an outcome sum to 1 and
    the loss is a mean over prompts; over rollouts that is a sum of `group`. Unknown grades have weight 0.
    """
    score_B = np.where(correct_B, -student_mean_B, teacher_mean_B) / temperature
    out_PG = np.zeros((len(score_B) // group, group))
    for member_B in (known_B & correct_B, known_B & ~correct_B):
        member_PG = member_B.reshape(out_PG.shape)
        score_PG = np.where(member_B, score_B, -np.inf).reshape(out_PG.shape)
        most_P1 = np.max(score_PG, axis=1, keepdims=True)
        share_PG = np.exp(score_PG - np.where(np.isfinite(most_P1), most_P1, 0.0))
        total_P1 = np.sum(share_PG, axis=1, keepdims=True)
        out_PG = out_PG + np.where(member_PG, group * share_PG / np.maximum(total_P1, 1e-30), 0.0)
    return out_PG.reshape(-1).astype(np.float32)
