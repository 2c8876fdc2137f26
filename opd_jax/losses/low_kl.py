"""Cut a rollout where student and teacher have agreed for a while (KAT, 2606.09471). NumPy, on the host.

Known second-hand, from one full reading of the paper. The paper ends generation at the cut, which needs the
teacher while tokens are sampled; here the tokens after it are left out of the loss.
"""

import numpy as np


def window_means(values: np.ndarray, window: int) -> np.ndarray:
    """z_i = mean of values[i : i + window]: float64 [N - window + 1] from [N]; empty where N < window."""
    if len(values) < window:
        return np.zeros(0)
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=-1, dtype=float)


def low_kl_cut(
    kl_BT: np.ndarray, mask_BT: np.ndarray, window: int, run: int, threshold: float
) -> np.ndarray:
    """Return how many of the tokens in `mask_BT` [B, T] stay of each row; int32 [B].

    `kl_BT` is KL(p_t || q_t), float [B, T]. The cut is at the start of the first of `run` windows in a row
    whose mean KL is below `threshold`. A window has `window` tokens of the mask, and begins one token after
    the window before it. A row without such windows stays as it is.
    """
    kept_B = mask_BT.sum(axis=1).astype(np.int32)
    for i, (kl_T, mask_T) in enumerate(zip(kl_BT, mask_BT, strict=True)):
        low = window_means(kl_T[mask_T], window) < threshold
        if len(low) >= run:
            runs = np.lib.stride_tricks.sliding_window_view(low, run).all(axis=-1)
            if runs.any():
                kept_B[i] = runs.argmax()
    return kept_B


def least_window_mean(kl_BT: np.ndarray, mask_BT: np.ndarray, window: int) -> np.ndarray:
    """Return min_i z_i of each row's tokens in `mask_BT` [B, T]; float64 [B], nan for shorter rows."""
    means = [
        window_means(kl_T[mask_T], window) for kl_T, mask_T in zip(kl_BT, mask_BT, strict=True)
    ]
    return np.array([z.min() if len(z) else np.nan for z in means])
