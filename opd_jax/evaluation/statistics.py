"""Numbers from graded answers: avg@k, pass@k, maj@k and how sure they are.

`correct_PK` [problems, samples] holds 1 for CORRECT, 0 for everything else. Every figure is a mean over
samples first, then over problems.
"""

import collections
import math
import re
from collections.abc import Hashable, Sequence

import numpy as np

_WHOLE = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,6}|[0-9]{1,20})")


def avg_at_k(correct_PK: np.ndarray) -> float:
    """avg@k: the mean over problems of the share of a problem's k answers that are correct."""
    return float(np.mean(np.mean(np.asarray(correct_PK, float), axis=1)))


def pass_at_k(correct_PK: np.ndarray, k: int) -> float:
    """pass@k = mean over problems of 1 - C(n - c, k) / C(n, k), of n answers c correct.

    The unbiased estimator of the chance that one of k answers is correct: Chen et al., Evaluating
    Large Language Models Trained on Code (2107.03374), Eq. 1. Raises ValueError where k is above n.
    """
    correct_PK = np.asarray(correct_PK)
    n = correct_PK.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers a problem, wanted k from 1 to {n}")
    found = [1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct_PK.sum(axis=1)]
    return float(np.mean(found))


def maj_at_k(classes_PK: Sequence[Sequence[Hashable | None]], correct_PK: np.ndarray) -> float:
    """maj@k: the share of problems whose most frequent answer is correct.

    Answers of one class are one answer (`answer_class`); None, an answer that could not be read, has no
    vote. Where m classes tie, a correct one among them counts 1/m: what a blind choice would get. A
    problem without votes counts 0.
    """
    found = []
    for classes, correct in zip(classes_PK, np.asarray(correct_PK, bool), strict=True):
        votes = collections.Counter(c for c in classes if c is not None)
        most = max(votes.values(), default=0)
        first = [c for c, count in votes.items() if count == most]
        right = {c for c, good in zip(classes, correct, strict=True) if good}
        found.append(len(right.intersection(first)) / len(first) if first else 0.0)
    return float(np.mean(found))


def answer_class(answer: str | None, grade: str) -> Hashable | None:
    """What answers have in common that are counted as one, given `answer` as answer.letters has it.

    Every CORRECT answer equals the gold one, so these are one class. Wrong ones are the same where they
    are letter for letter, or the same whole number: math-verify is not asked about each pair of them,
    so "1/2" and "0.5", both wrong, are two. UNPARSED answers have no class; one that timed out does.
    """
    if grade == "CORRECT":
        return ("correct",)
    if grade == "UNPARSED" or answer is None:
        return None
    return (int(answer.replace(",", "")),) if _WHOLE.fullmatch(answer) else answer


def stderr(correct_PK: np.ndarray) -> float:
    """Standard error of avg@k over problems: s / sqrt(P), s the deviation of the problems' means.

    0 for one problem, of which nothing can be said.
    """
    mean_P = np.mean(np.asarray(correct_PK, float), axis=1)
    return float(mean_P.std(ddof=1) / math.sqrt(len(mean_P))) if len(mean_P) > 1 else 0.0


def bootstrap(
    correct_PK: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Standard error of avg@k, and its 2.5 % and 97.5 % quantiles, from problems drawn with replacement."""
    mean_P = np.mean(np.asarray(correct_PK, float), axis=1)
    drawn = np.random.default_rng(seed).integers(0, len(mean_P), (draws, len(mean_P)))
    means = mean_P[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(means.std(ddof=1)), float(low), float(high)
