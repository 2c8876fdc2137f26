"""Several teachers of one rollout: the weighted mean of their log-ratios.

NumPy, on the host, where the scores of the teachers meet. K is the number of teachers.
"""

from collections.abc import Sequence

import numpy as np


def shares(weights: Sequence[float]) -> np.ndarray:
    """w_k / sum of w: the weights of a mixture, which sum to 1. float32 [K]."""
    weight_K = np.asarray(weights, float)
    return (weight_K / weight_K.sum()).astype(np.float32)


def mixture(*, values_KBT: Sequence[np.ndarray], share_K: np.ndarray) -> np.ndarray:
    """sum_k w_k x_k of what each teacher gives a token; float32 [B, T].

    Of log-probs x_k = log q_k(y_t) it makes the advantage of a mixture of teachers, a constant:

        A_t = sum_k w_k (log q_k(y_t) - log p(y_t)) = log q(y_t) - log p(y_t),  log q = sum_k w_k log q_k

    a mean of log-ratios, so that q is the *geometric* mean of the teachers, up to its normaliser Z(s_t),
    which does not depend on y_t and has no effect in expectation. The expected gradient is that of

        sum_k w_k KL(p || q_k) = KL(p || q / Z) - log Z

    MAD-OPD (2605.01347) sums divergences in this way, sum_k w_k D(p || q_k); for the reverse KL its sampled
    token gives A_t. Equal weights are the mean over domains of slime's MOPD (pull request 2051). Of reverse
    KLs x_k = KL(p || q_k) it is the left side above.

    Trap: log sum_k w_k q_k, the mean of probabilities, is another teacher. It is never below log q, and a
    single teacher that is sure makes it large. None of these sources uses it.

    A teacher whose weight is 0 is not read, whatever its numbers are.
    """
    total_BT = np.zeros(np.shape(values_KBT[0]), np.float32)
    for share, values_BT in zip(share_K, values_KBT, strict=True):
        if share:
            total_BT = total_BT + np.float32(share) * np.asarray(values_BT, np.float32)
    return total_BT
