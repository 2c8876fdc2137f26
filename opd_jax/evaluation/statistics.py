"""Statistics of graded answers: avg@k, pass@k, maj@k, and their standard errors.

`correct_PK` [problems, samples] is 1 for CORRECT and 0 for every other grade. Every figure is a mean over
samples first, and then over problems.
"""

import collections
import math
import re
from collections.abc import Hashable, Sequence

import numpy as np

_WHOLE = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,6}|[0-9]{1,20})")


def avg_at_k(correct_PK: np.ndarray) -> float:
    """avg@k: share of correct answers among the k answers of a problem, averaged over problems."""
    return float(np.mean(np.mean(np.asarray(correct_PK, float), axis=1)))


def pass_at_k(correct_PK: np.ndarray, k: int) -> float:
    """pass@k = mean over problems of 1 - C(n - c, k) / C(n, k), where c of n answers are correct.

    The unbiased estimator of the probability that at least one of k answers is correct: Chen et al.,
    Evaluating Large Language Models Trained on Code (2107.03374), Eq. 1. Raises ValueError if k > n.
    """
    correct_PK = np.asarray(correct_PK)
    n = correct_PK.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers per problem is undefined; set k from 1 to {n}")
    estimates = [1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct_PK.sum(axis=1)]
    return float(np.mean(estimates))


def maj_at_k(classes_PK: Sequence[Sequence[Hashable | None]], correct_PK: np.ndarray) -> float:
    """maj@k: share of problems whose most frequent answer is correct.

    Answers of the same class count as the same answer (`answer_class`); None, the class of an answer
    that cannot be parsed, has no vote. If m classes tie and one of them is correct, the problem counts
    1/m, the expectation of a random choice. A problem without votes counts 0.
    """
    scores = []
    for classes, correct in zip(classes_PK, np.asarray(correct_PK, bool), strict=True):
        votes = collections.Counter(c for c in classes if c is not None)
        most = max(votes.values(), default=0)
        winners = [c for c, count in votes.items() if count == most]
        correct_classes = {c for c, good in zip(classes, correct, strict=True) if good}
        share = len(correct_classes.intersection(winners)) / len(winners) if winners else 0.0
        scores.append(share)
    return float(np.mean(scores))


def answer_class(answer: str | None, grade: str) -> Hashable | None:
    """Return the class of an answer in maj@k; answers of one class count as the same answer.

    `answer` is the result of extract.letters. All CORRECT answers equal the gold answer and form one
    class. Other answers are in the same class if their letters are equal or they are the same integer.
    math-verify does not compare pairs of wrong answers, so "1/2" and "0.5", both wrong, are two classes.
    UNPARSED answers have no class (None); an answer that timed out has one.
    """
    if grade == "CORRECT":
        return ("correct",)
    if grade == "UNPARSED" or answer is None:
        return None
    return (int(answer.replace(",", "")),) if _WHOLE.fullmatch(answer) else answer


def stderr(correct_PK: np.ndarray) -> float:
    """Standard error of avg@k over problems: s / sqrt(P), s the standard deviation of the problems' means.

    0 for a single problem, for which it is undefined.
    """
    mean_P = np.mean(np.asarray(correct_PK, float), axis=1)
    return float(mean_P.std(ddof=1) / math.sqrt(len(mean_P))) if len(mean_P) > 1 else 0.0


def bootstrap(
    correct_PK: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Bootstrap over problems: standard error of avg@k, and its 2.5 % and 97.5 % quantiles."""
    mean_P = np.mean(np.asarray(correct_PK, float), axis=1)
    indices = np.random.default_rng(seed).integers(0, len(mean_P), (draws, len(mean_P)))
    means = mean_P[indices].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(means.std(ddof=1)), float(low), float(high)
