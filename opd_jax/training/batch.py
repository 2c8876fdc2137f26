"""Rows for the update, built from rollouts and scores: tokens that count, and constants. Host arrays."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import data, losses, metrics
from opd_jax.errors import ShapeError
from opd_jax.grading.grader import Grade, decided
from opd_jax.losses.gates import REPLACING
from opd_jax.models import decoder
from opd_jax.training.terms import Terms
from opd_jax.types import GoldenRows, Outcome, Rollout, RolloutRows, Scores, TeacherRows

Rows = TypeVar("Rows", RolloutRows, GoldenRows)
Weigh = Callable[[np.ndarray], Any]  # bool [B, T] -> weight of each token, float32 [B, T]


def scored_mask(
    rollout: Rollout, counted_V: np.ndarray, first_pieces: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Return the response tokens on which student and teacher can be compared; bool [B, T].

    It excludes ids that mean different things to them (not in `counted_V`) and, for each group of ids in
    `first_pieces`, its first occurrence in a response. 2603.25562 does the latter for "<", "think" and the
    end of turn, with which one model's template may open the response where the other's does not.
    """
    mask_BT = rollout.response_mask_BT
    tokens_BT = rollout.tokens_BT
    scored_BT = mask_BT & counted_V[np.minimum(tokens_BT, len(counted_V) - 1)]
    for ids in first_pieces:
        any_BT = mask_BT & np.isin(tokens_BT, np.asarray(ids))
        first_BT = any_BT & (np.cumsum(any_BT, axis=1) == 1)
        scored_BT = scored_BT & ~first_BT
    return scored_BT


def teacher_rows(
    rollout: Rollout, prompts: Sequence[Sequence[int]], teacher_ids: np.ndarray, *, width: int
) -> TeacherRows:
    """Join the rollouts' responses, in the teacher's ids, to the teacher's prompts (one per row).

    `teacher_ids` maps the student's ids to the teacher's (data.vocabulary); `width` fixes the shape.
    """
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    length_B = np.zeros(len(prompts), np.int32)
    offset_B = np.array([len(p) for p in prompts], np.int32) - rollout.prompt_length_B
    for i, prompt in enumerate(prompts):
        row = [*prompt, *teacher_ids[rollout.response(i)]]
        tokens_BT[i, : len(row)], length_B[i] = row, len(row)
    return TeacherRows(tokens_BT=tokens_BT, length_B=length_B, offset_B=offset_B)


def counted(rollout: Rollout, mask_BT: np.ndarray, *, truncated: str, tail: int) -> np.ndarray:
    """Return the scored tokens that count in the loss; bool [B, T].

    Of truncated rollouts, "keep" counts all tokens, "mask" none, and "tail" all but the last `tail` tokens
    of the response.
    """
    if truncated == "keep":
        return mask_BT
    kept_B = rollout.length_B - (tail if truncated == "tail" else rollout.length_B)
    end_B = np.where(metrics.truncated(rollout.outcome_B), kept_B, rollout.length_B)
    return mask_BT & (np.arange(mask_BT.shape[1])[None] < end_B[:, None])


def rollout_rows(
    rollout: Rollout,
    scores: Scores,
    counted_BT: np.ndarray,
    advantage_BT: np.ndarray,
    terms: Terms,
    *,
    weigh: Weigh,
    factor_BT: np.ndarray | None = None,
    gate_BT: np.ndarray | None = None,
) -> RolloutRows:
    """Return rollouts as rows for the update: token weights, advantages, log-probs of the sampling weights.

    `counted_BT` marks the tokens that count; `weigh` turns it into weights (losses.token_weights). The
    denominator of the PPO ratio is the scorer's log-prob under the weights that sampled, not the sampler's
    record: the ratio is then 1 at the first update, whatever kernels decoding uses. The difference between
    the two is logged as `rollout/sampler_logprob_gap_*`.

    `factor_BT` multiplies the weights, or the teacher's advantage over a support (`loss.token_weight_on`);
    `advantage_BT` has it already. `gate_BT` multiplies the divergence; a gate that replaces the surrogate
    multiplies the advantages by 1 - gate.
    """
    kept_BT = None
    if gate_BT is not None and terms.gate in REPLACING:
        kept_BT = 1.0 - gate_BT
        advantage_BT = advantage_BT * kept_BT
    on_support = None
    if terms.on_support:
        assert scores.support is not None
        on_support = terms.teacher_coef * losses.support_advantage(
            student_logprob_BTX=jnp.asarray(scores.support.student_BTX),
            teacher_logprob_BTX=jnp.asarray(scores.support.teacher_BTX),
            weight=terms.support_weight,
            normalise=terms.support != "symmetric_difference",
        )
        for more_BT in (kept_BT, factor_BT if terms.token_weight_on == "teacher" else None):
            if more_BT is not None:
                on_support = on_support * more_BT[..., None]
    return RolloutRows(
        tokens_BT=rollout.tokens_BT,
        length_B=rollout.length_B,
        weight_BT=np.asarray(weigh(counted_BT)),
        advantage_BT=advantage_BT,
        sampler_logprob_BT=np.asarray(scores.student_logprob_BT),
        teacher_hidden_BTD=scores.teacher_hidden_BTD,
        support=scores.support,
        support_advantage_BTX=None if on_support is None else np.asarray(on_support),
        divergence_gate_BT=gate_BT,
        token_factor_BT=factor_BT if terms.token_weight_on == "all" else None,
    )


def as_rollout(
    prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], *, width: int
) -> Rollout:
    """Return golden solutions, end tokens included, as rollouts, so that they are scored as rollouts are.

    Nothing of this run sampled them: the sampler's log-probs are 0. Raises DataError for a row that does not
    fit `width`.
    """
    tokens_BT, length_B, _ = data.golden_rows(prompts, solutions, width=width)
    return Rollout(
        tokens_BT=tokens_BT,
        length_B=length_B,
        prompt_length_B=np.array([len(prompt) for prompt in prompts], np.int32),
        sampler_logprob_BT=np.zeros(tokens_BT.shape, np.float32),
        outcome_B=np.full(len(length_B), Outcome.EOS, np.int32),
    )


def golden_rows(
    golden: Rollout,
    *,
    weigh: Weigh,
    scores: Scores | None = None,
    scored_BT: np.ndarray | None = None,
) -> GoldenRows:
    """Return golden solutions (see `as_rollout`) as rows for the update.

    `scores` are those of both models on them, for a divergence, which counts the tokens in `scored_BT`.
    """
    rows = GoldenRows(
        tokens_BT=golden.tokens_BT,
        length_B=golden.length_B,
        weight_BT=np.asarray(weigh(golden.response_mask_BT)),
    )
    if scores is None:
        return rows
    assert scored_BT is not None
    return rows.replace(
        divergence_weight_BT=np.asarray(weigh(scored_BT)),
        teacher_hidden_BTD=scores.teacher_hidden_BTD,
        support=scores.support,
    )


def share(rows: Rows, index: int, parts: int, *, weigh: Weigh) -> Rows:
    """Return minibatch `index` of `parts` equal ones, with token weights normalised within it.

    Factors of the weights are those of the whole batch; here they are multiplied into the weights, the only
    part of them that the update reads.
    Raises ShapeError where `parts` does not divide the rows, because some rows would be dropped.
    """
    if parts == 1:
        return _folded(rows)
    size, rest = divmod(len(rows.length_B), parts)
    if rest:
        raise ShapeError(
            f"{len(rows.length_B)} rows do not divide into {parts} equal shares; set "
            "--config.optim.updates_per_rollout to a divisor of --config.rollout.prompts_per_step"
        )

    def one(x: np.ndarray) -> np.ndarray:
        return x[index * size : (index + 1) * size]

    rows = jax.tree.map(one, rows)
    rows = rows.replace(weight_BT=np.asarray(weigh(rows.weight_BT > 0)))
    if isinstance(rows, GoldenRows) and rows.divergence_weight_BT is not None:
        again_BT = np.asarray(weigh(rows.divergence_weight_BT > 0))
        rows = rows.replace(divergence_weight_BT=again_BT)
    return _folded(rows)


def _folded(rows: Rows) -> Rows:
    """Multiply the factors of the weights, if any, into the weights."""
    if not isinstance(rows, RolloutRows) or rows.token_factor_BT is None:
        return rows
    return rows.replace(weight_BT=rows.weight_BT * rows.token_factor_BT, token_factor_BT=None)


def as_lines(
    step: int,
    rollout: Rollout,
    scores: Scores,
    advantage_BT: np.ndarray,
    *,
    count: int,
    decode: Callable[[list[int]], str],
    ids: Sequence[str],
    grades: Sequence[Grade | None] | None = None,
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts of a step as lines of rollouts.jsonl, with both models' log-probs.

    `ids` names the problems; all have the same number of rollouts, which are adjacent. `id` and `sample` of
    a line name its problem and its rollout of that problem. `correct` is null where no grade decides it.
    `advantage_BT` is that of the sampled tokens, whatever ids the loss sums over.
    """
    per_token = {
        "sampler_logprob": rollout.sampler_logprob_BT,
        "student_logprob": scores.student_logprob_BT,
        "teacher_logprob": scores.teacher_logprob_BT,
        "advantage": advantage_BT,
    }

    group = len(rollout.length_B) // len(ids)

    def one(i: int) -> dict[str, Any]:
        span = slice(int(rollout.prompt_length_B[i]), int(rollout.length_B[i]))
        grade = grades[i] if grades is not None else None
        line = {
            "step": step,
            "id": ids[i // group],
            "sample": i % group,
            "prompt": decode(rollout.prompt(i)),
            "response": decode(rollout.response(i)),
            "prompt_ids": rollout.prompt(i),
            "response_ids": rollout.response(i),
            "outcome": Outcome(int(rollout.outcome_B[i])).name.lower(),
            "grade": grade and grade.value.lower(),
            "correct": grade is Grade.CORRECT if decided(grade) else None,
        }
        known = {name: values for name, values in per_token.items() if values is not None}
        return line | {name: _rounded(values[i, span]) for name, values in known.items()}

    return [one(i) for i in range(count)]


def _rounded(values: np.ndarray) -> list[float | None]:
    """Round to 5 digits; None is the log-prob of a token that the two models do not both score."""
    return [round(float(x), 5) if x > decoder.EXCLUDED / 2 else None for x in values]
