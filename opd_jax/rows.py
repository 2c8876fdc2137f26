"""From records to rows for the update: which tokens count, with which constants, in which shapes."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import losses, metrics
from opd_jax.types import GoldenRows, Rollout, RolloutRows, Scores

Rows = TypeVar("Rows", RolloutRows, GoldenRows)


def bucket(longest: int, width: int) -> int:
    """The width to run a batch at: the least quarter of `width` that holds its longest row.

    Four shapes at most are ever compiled, and short batches do not pay for the whole budget.
    """
    quarter = math.ceil(width / 4)
    return min(quarter * math.ceil(longest / quarter), width)


def trim(rollout: Rollout, width: int) -> Rollout:
    """The same rollouts in narrower rows, none of which is longer than `width`."""
    return rollout.replace(
        tokens_BT=rollout.tokens_BT[:, :width],
        sampler_logprob_BT=rollout.sampler_logprob_BT[:, :width],
    )


def rollout_rows(
    rollout: Rollout, scores: Scores, *, truncated: str, aggregation: str
) -> RolloutRows:
    """Rollouts as the update takes them: token weights, advantages, the sampling weights' log-probs.

    `truncated` = "mask" leaves rollouts that ran out of budget out of the mean. The denominator of
    the PPO ratio is the scorer's log-prob under the weights that sampled, not the sampler's record:
    the ratio is then 1 at the first update, whatever kernels decoding uses; the difference of the
    two is logged as `rollout/sampler_logprob_gap_*`.
    """
    mask_BT = rollout.response_mask_BT
    if truncated == "mask":
        mask_BT = mask_BT & ~metrics.truncated(rollout.outcome_B)[:, None]
    return RolloutRows(
        tokens_BT=jnp.asarray(rollout.tokens_BT),
        length_B=jnp.asarray(rollout.length_B),
        weight_BT=losses.token_weights(mask_BT, aggregation),
        advantage_BT=losses.opd_advantage(
            teacher_logprob_BT=scores.teacher_logprob_BT,
            student_logprob_BT=scores.student_logprob_BT,
        ),
        sampler_logprob_BT=scores.student_logprob_BT,
    )


def golden_rows(
    tokens_BT: np.ndarray, length_B: np.ndarray, mask_BT: np.ndarray, *, aggregation: str
) -> GoldenRows:
    """Golden solutions (see data.golden_rows) as the update takes them."""
    return GoldenRows(
        tokens_BT=jnp.asarray(tokens_BT),
        length_B=jnp.asarray(length_B),
        weight_BT=losses.token_weights(mask_BT, aggregation),
    )


def part(rows: Rows, index: int, parts: int) -> Rows:
    """The `index`-th of `parts` equal shares of the rows, its weights summing to 1 again."""
    if parts == 1:
        return rows

    def share(x: jax.Array) -> jax.Array:
        size = x.shape[0] // parts
        return x[index * size : (index + 1) * size]

    rows = jax.tree.map(share, rows)
    total = jnp.sum(rows.weight_BT)
    return rows.replace(weight_BT=rows.weight_BT / jnp.where(total > 0, total, 1.0))
