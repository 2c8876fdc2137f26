"""How the teacher's reward separates correct answers from incorrect ones (2604.13016, section 6.2)."""

import numpy as np


def sequence_reward(advantage_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Return the mean of log q - log p over each rollout; [B], nan where no token is scored.

    2604.13016, section 6.2.
    """
    count_B = mask_BT.sum(axis=1)
    sum_B = np.sum(advantage_BT, axis=1, where=mask_BT, dtype=float)
    return np.divide(sum_B, count_B, out=np.full(len(count_B), np.nan), where=count_B > 0)


def right_against_wrong(
    reward_B: np.ndarray | None, correct_B: np.ndarray, graded_B: np.ndarray | None = None
) -> dict[str, float]:
    """Return the accuracy, and the teacher's reward (`sequence_reward`) of correct and incorrect answers.

    2604.13016, section 6.2 and Fig. 14. The AUROC is the probability that a correct answer has a larger
    reward than an incorrect one. An empty class has no keys; `reward_B` is None without a teacher.
    All metrics cover the rollouts in `graded_B` (None = all), whose number is `rollout/graded`.
    """
    graded_B = np.ones(len(correct_B), bool) if graded_B is None else graded_B
    row = {"rollout/graded": float(np.sum(graded_B))}
    if graded_B.any():
        row["rollout/accuracy"] = float(np.mean(correct_B[graded_B]))
    if reward_B is None:
        return row
    scored_B = graded_B & ~np.isnan(reward_B)
    right, wrong = reward_B[scored_B & correct_B], reward_B[scored_B & ~correct_B]
    if right.size:
        row["score/reward_right"] = float(np.mean(right))
    if wrong.size:
        row["score/reward_wrong"] = float(np.mean(wrong))
    if right.size and wrong.size:
        row["score/reward_auroc"] = auroc(right, wrong)
    return row


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return P(positive > negative) + P(positive = negative) / 2 over all pairs (Mann-Whitney), exactly."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left").sum()
    up_to = np.searchsorted(ordered, positive, side="right").sum()
    return float((below + up_to) / 2 / (len(positive) * len(negative)))
