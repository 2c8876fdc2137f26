"""From records to rows for the update: which tokens count, with which constants. Host arrays."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import losses, metrics
from opd_jax.models import decoder
from opd_jax.types import GoldenRows, Outcome, Rollout, RolloutRows, Scores, TeacherRows

Rows = TypeVar("Rows", RolloutRows, GoldenRows)


def scored_mask(
    rollout: Rollout, scored_V: np.ndarray, first_pieces: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Response tokens that both models can be held to; bool [B, T].

    Left out are ids that mean different things to them (not in `scored_V`) and, for each group of
    ids in `first_pieces`, its first occurrence in a response: 2603.25562 does so for "<", "think"
    and the end of turn, which one model's template may open the response with and the other's not.
    """
    mask_BT = rollout.response_mask_BT
    tokens_BT = rollout.tokens_BT
    scored_BT = mask_BT & scored_V[np.minimum(tokens_BT, len(scored_V) - 1)]
    for ids in first_pieces:
        found_BT = mask_BT & np.isin(tokens_BT, np.asarray(ids))
        first_BT = found_BT & (np.cumsum(found_BT, axis=1) == 1)
        scored_BT = scored_BT & ~first_BT
    return scored_BT


def teacher_rows(
    rollout: Rollout, prompts: Sequence[Sequence[int]], teacher_ids: np.ndarray, *, width: int
) -> TeacherRows:
    """The rollouts' responses behind the teacher's prompts (one a row), in the teacher's ids.

    `teacher_ids` maps the student's ids to the teacher's (data.alignment); `width` fixes the shape.
    """
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    length_B = np.zeros(len(prompts), np.int32)
    offset_B = np.array([len(p) for p in prompts], np.int32) - rollout.prompt_length_B
    for i, prompt in enumerate(prompts):
        row = [*prompt, *teacher_ids[rollout.response(i)]]
        tokens_BT[i, : len(row)], length_B[i] = row, len(row)
    return TeacherRows(tokens_BT=tokens_BT, length_B=length_B, offset_B=offset_B)


def rollout_rows(
    rollout: Rollout, scores: Scores, mask_BT: np.ndarray, *, truncated: str, aggregation: str
) -> RolloutRows:
    """Rollouts as the update takes them: token weights, advantages, the sampling weights' log-probs.

    `mask_BT` holds the tokens that count (`scored_mask`); `truncated` = "mask" leaves rollouts that
    ran out of budget out of the mean. The denominator of the PPO ratio is the scorer's log-prob
    under the weights that sampled, not the sampler's record: the ratio is then 1 at the first
    update, whatever kernels decoding uses; the difference of the two is logged as
    `rollout/sampler_logprob_gap_*`.
    """
    if truncated == "mask":
        mask_BT = mask_BT & ~metrics.truncated(rollout.outcome_B)[:, None]
    return RolloutRows(
        tokens_BT=rollout.tokens_BT,
        length_B=rollout.length_B,
        weight_BT=np.asarray(losses.token_weights(mask_BT, aggregation)),
        advantage_BT=np.asarray(
            losses.opd_advantage(
                teacher_logprob_BT=jnp.asarray(scores.teacher_logprob_BT),
                student_logprob_BT=jnp.asarray(scores.student_logprob_BT),
            )
        ),
        sampler_logprob_BT=np.asarray(scores.student_logprob_BT),
    )


def golden_rows(
    tokens_BT: np.ndarray, length_B: np.ndarray, mask_BT: np.ndarray, *, aggregation: str
) -> GoldenRows:
    """Golden solutions (see data.golden_rows) as the update takes them."""
    weight_BT = np.asarray(losses.token_weights(mask_BT, aggregation))
    return GoldenRows(tokens_BT=tokens_BT, length_B=length_B, weight_BT=weight_BT)


def share(rows: Rows, index: int, parts: int) -> Rows:
    """The `index`-th of `parts` equal shares of the rows, its weights summing to 1 again."""
    if parts == 1:
        return rows

    def one(x: np.ndarray) -> np.ndarray:
        size = x.shape[0] // parts
        return x[index * size : (index + 1) * size]

    rows = jax.tree.map(one, rows)
    total = rows.weight_BT.sum()
    return rows.replace(weight_BT=rows.weight_BT / (total if total > 0 else 1.0))


def as_lines(
    step: int,
    rollout: Rollout,
    scores: Scores,
    *,
    count: int,
    decode: Callable[[list[int]], str],
) -> list[dict[str, Any]]:
    """The first `count` rollouts of a step as rows of rollouts.jsonl, with what both models said."""
    per_token = {
        "sampler_logprob": rollout.sampler_logprob_BT,
        "student_logprob": np.asarray(scores.student_logprob_BT),
        "teacher_logprob": np.asarray(scores.teacher_logprob_BT),
        "advantage": np.asarray(scores.teacher_logprob_BT - scores.student_logprob_BT),
    }

    def one(i: int) -> dict[str, Any]:
        span = slice(int(rollout.prompt_length_B[i]), int(rollout.length_B[i]))
        line = {
            "step": step,
            "id": i,
            "prompt": decode(rollout.prompt(i)),
            "response": decode(rollout.response(i)),
            "prompt_ids": rollout.prompt(i),
            "response_ids": rollout.response(i),
            "outcome": Outcome(int(rollout.outcome_B[i])).name.lower(),
        }
        return line | {name: _rounded(values[i, span]) for name, values in per_token.items()}

    return [one(i) for i in range(count)]


def _rounded(values: np.ndarray) -> list[float | None]:
    """None stands for a log-prob of a token that is outside what both models score."""
    return [round(float(x), 5) if x > decoder.EXCLUDED / 2 else None for x in values]
