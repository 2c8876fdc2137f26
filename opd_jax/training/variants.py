"""How much each advantage shape and each token weight would have changed an update: a diagnosis on the host.

At ratio 1 the gradient of the surrogate on sampled tokens is -sum_t w_t A_t grad log p(y_t). Shapes and
weights change only the vector of w_t A_t over the tokens that count. `compare` builds this vector once more
for each variant, from scores that are there, and compares it with the run's own: no model is called and
no program of the update changes. A variant whose statistics the run has not scored is left out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opd_jax.training.terms import Terms
from opd_jax.types import RolloutRows, Scores

_EVERYWHERE = {"token_weight_on": "all"}
# Each variant replaces these numbers of the run's loss and keeps the others. They are the numbers of the
# methods in configs/methods.py, which has the source and the mark of each. The k of `ta` and `selectkd` and
# the window of `step` are the run's own.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "log_ratio": {"advantage_shape": "log_ratio"},
    "clamp": {"advantage_clamp": 5.0},  # 2603.25562
    "extrapolation": {"extrapolation": 1.25},  # 2602.12125
    "baseline": {"advantage_shape": "baseline"},  # 2605.07865
    "power": {"advantage_shape": "power", "advantage_shape_value": 2.0},  # 2606.17199
    "soft_log": {"advantage_shape": "soft_log"},  # 2607.13399
    "floor": {"advantage_shape": "floor", "advantage_shape_value": 0.2},  # 2603.11137
    "skew": {"advantage_shape": "skew", "advantage_shape_value": 0.1},  # 2402.03898
    "f_reverse": {"advantage_shape": "f_reverse"},  # 2606.01039
    "f_forward": {"advantage_shape": "f_forward"},  # 2606.01039
    "f_jsd": {"advantage_shape": "f_jsd"},  # 2606.01039
    "f_total_variation": {"advantage_shape": "f_total_variation"},  # 2606.01039
    "unlikely": {"advantage_shape": "unlikely", "advantage_shape_value": 0.1},  # 2608.31046
    "unweighted": {"token_weight": "none"},
    "iw": {  # 2606.22600
        "token_weight": "iw", "token_weight_on": "teacher", "token_weight_strength": 0.5,
    },
    "prune": _EVERYWHERE | {  # 2605.07804
        "token_weight": "prune", "token_weight_threshold": 0.9, "token_weight_drop": 0.02,
        "token_weight_least": 0.0,
    },
    "step": {  # 2605.07725
        "token_weight": "step", "token_weight_on": "teacher", "token_weight_strength": 0.2,
    },
    "fire": _EVERYWHERE | {  # 2606.02684
        "token_weight": "fire", "token_weight_strength": 1.0, "token_weight_keep": 0.8,
    },
    "tip": _EVERYWHERE | {  # 2604.14084
        "token_weight": "tip", "token_weight_keep": 0.5, "token_weight_quantile": 1.0,
    },
    "ta": _EVERYWHERE | {  # 2605.26844
        "token_weight": "ta", "token_weight_keep": 0.05, "token_weight_quantile": 0.95,
    },
    "selectkd": _EVERYWHERE | {  # 2510.24021
        "token_weight": "selectkd", "token_weight_least": 0.01,
    },
}  # fmt: skip


def compare(
    own: RolloutRows, terms: Terms, scores: Scores, rows_of: Callable[[Terms], RolloutRows]
) -> dict[str, float]:
    """Return `variant/NAME_cosine` and `variant/NAME_norm_ratio` of every variant that can be computed.

    `own` are the run's rows and `terms` its loss; `rows_of` returns the rows that the same rollouts, the same
    counted tokens and the same rewards would have with other numbers of the loss.
    """
    found: dict[str, float] = {}
    with np.errstate(invalid="ignore", over="ignore"):  # scores that are not finite skip the update
        own_BT = token_vector(own)
        for name, numbers in VARIANTS.items():
            other = dataclasses.replace(terms, **numbers)
            if not _computable(other, terms, scores):
                continue
            pair = agreement(own_BT=own_BT, other_BT=token_vector(rows_of(other)))
            found |= {f"variant/{name}_{key}": value for key, value in pair.items()}
    return found


def token_vector(rows: RolloutRows) -> np.ndarray:
    """Return w_t A_t of each token, 0 where none counts; float64 [B, T]."""
    out_BT = np.where(rows.weight_BT > 0, rows.advantage_BT, 0.0) * np.float64(rows.weight_BT)
    return out_BT if rows.token_factor_BT is None else out_BT * rows.token_factor_BT


def agreement(*, own_BT: np.ndarray, other_BT: np.ndarray) -> dict[str, float]:
    """Return the cosine of two vectors over all tokens, and |other| / |own| as norm_ratio.

    A number that is not defined is left out: both where `own_BT` is 0, the cosine where `other_BT` is 0.
    Equal vectors give exactly 1 and 1.
    """
    own, other = np.sum(own_BT * own_BT), np.sum(other_BT * other_BT)
    if not (np.isfinite(own) and np.isfinite(other) and own > 0):
        return {}
    found = {"norm_ratio": float(np.sqrt(other / own))}
    if other > 0:
        cosine = np.sum(own_BT * other_BT) / np.sqrt(own * other)  # sqrt(x * x) is exactly x
        found["cosine"] = float(np.clip(cosine, -1.0, 1.0))
    return found


def _computable(other: Terms, terms: Terms, scores: Scores) -> bool:
    """Return whether the step has scored what `other` reads, and config/validate.py would accept it."""
    if other.scored_statistic not in (None, terms.scored_statistic):
        return False
    if other.scores_reference:
        probabilities = other.advantage_shape in ("baseline", "power", "skew", "unlikely")
        if scores.reference_logprob_BT is None or probabilities:
            return False
    return not (other.advantage_shape == "baseline" and other.discount)
