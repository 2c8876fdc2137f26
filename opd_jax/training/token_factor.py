"""Which tokens weigh how much, and where the divergence has a gate: the config's choices, on the host.

The equations are in losses/token_factors.py and losses/gates.py; here they are given the scores of a step.
Both results are None where the config asks for neither, and then nothing is computed.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.losses import gates, token_factors
from opd_jax.training.batch import Weigh
from opd_jax.training.experience import Experience
from opd_jax.training.terms import Terms
from opd_jax.types import Rollout, RolloutRows, Scores

Decode = Callable[[list[int]], str]
_BLANK_LINE = re.compile(r"\n\s*\n")


def token_factor(
    experience: Experience,
    counted_BT: np.ndarray,
    terms: Terms,
    *,
    weigh: Weigh,
    group: int,
    decode: Decode,
) -> np.ndarray | None:
    """Return the factor of each counted token, rescaled to keep the sum of weights; [B, T] or None.

    `weigh` gives the weights without it, `group` is the number of rollouts of a prompt, and `decode` is
    used for steps that are paragraphs. Rollouts that a gate closes have 0.
    """
    if terms.token_rule == "none" and terms.rollout_gate == "none":
        return None
    open_BT = counted_BT
    with np.errstate(invalid="ignore", over="ignore"):  # scores that are not finite skip the update
        if terms.rollout_gate != "none":
            open_B = _open_rollouts(experience, counted_BT, terms, group)
            open_BT = counted_BT & open_B[:, None]
        factor_BT = open_BT.astype(np.float32)
        if terms.token_rule != "none":
            factor_BT = _by_token(experience, open_BT, terms, decode)
        return token_factors.rescaled(factor_BT, np.asarray(weigh(counted_BT)))


def divergence_gate(
    scores: Scores, counted_BT: np.ndarray, terms: Terms, *, key: jax.Array
) -> np.ndarray | None:
    """Return the gate of each token's divergence, 0 or 1; float32 [B, T], None without a gate.

    `key` is that of the step's draws, for a gate that draws.
    """
    if not terms.gated:
        return None
    pair = {
        "teacher_logprob_BT": scores.teacher_logprob_BT,
        "student_logprob_BT": scores.student_logprob_BT,
        "mask_BT": counted_BT,
    }
    with np.errstate(invalid="ignore", over="ignore"):
        if terms.gate == "entropy":
            return gates.entropy_gate(
                teacher_entropy_BT=scores.teacher_entropy_BT, mask_BT=counted_BT,
                threshold=terms.gate_threshold,
            )  # fmt: skip
        if terms.gate == "advantage":
            return gates.advantage_gate(**pair, threshold=terms.gate_threshold)
        rows, width = counted_BT.shape
        return gates.acceptance_gate(**pair, uniform_BT=gates.uniforms(key, rows=rows, width=width))


def step_ids(rollout: Rollout, *, window: int, decode: Decode) -> np.ndarray:
    """Number the steps of each response from 0; int32 [B, T], -1 outside the response.

    A step is `window` tokens, or with window 0 a paragraph: the text up to the next blank line, which still
    belongs to it. SOD (2605.07725) has steps between tool calls; these two definitions are ours.
    """
    out_BT = np.full(rollout.tokens_BT.shape, -1, np.int32)
    pieces: dict[int, _Piece] = {}
    for row in range(len(rollout.length_B)):
        ids, start = rollout.response(row), int(rollout.prompt_length_B[row])
        steps = _paragraphs(ids, pieces, decode) if not window else np.arange(len(ids)) // window
        out_BT[row, start : start + len(ids)] = steps
    return out_BT


def measured(rows: RolloutRows) -> dict[str, float]:
    """Return what a gate and a factor do: the share of open tokens, and of tokens without a weight."""
    counted_BT, out = rows.weight_BT > 0, {}
    if not counted_BT.any():
        return {}
    if rows.divergence_gate_BT is not None:
        out["loss/gate_open"] = float(np.mean(rows.divergence_gate_BT[counted_BT]))
    if rows.token_factor_BT is not None:
        out["loss/unweighted_tokens"] = float(np.mean(rows.token_factor_BT[counted_BT] == 0))
    return out


class _Piece(NamedTuple):
    """White space around the text of an id, and blank lines within; a blank id is all `before`."""

    before: str
    blank: bool
    within: int
    after: str


def _piece(text: str) -> _Piece:
    body = text.strip()
    if not body:
        return _Piece(text, True, 0, "")
    start = text.index(body)
    return _Piece(text[:start], False, len(_BLANK_LINE.findall(body)), text[start + len(body) :])


def _paragraphs(ids: list[int], pieces: dict[int, _Piece], decode: Decode) -> list[int]:
    """Return the paragraph of each token; a token with a blank line within belongs to the first one."""
    steps, step, space, begun = [], 0, "", False
    for token in ids:
        if token not in pieces:
            pieces[token] = _piece(decode([token]))
        piece = pieces[token]
        space += piece.before
        if piece.blank:
            steps.append(step)
            continue
        if begun and "\n" in space:  # a response may begin with blank lines
            step += bool(_BLANK_LINE.search(space))
        steps.append(step)
        step, space, begun = step + piece.within, piece.after, True
    return steps


def _open_rollouts(
    experience: Experience, counted_BT: np.ndarray, terms: Terms, group: int
) -> np.ndarray:
    """Return the rollouts that the gate leaves open; bool [B]. A rollout without a reward is closed."""
    reward = experience.reward(group)
    if terms.rollout_gate == "correct":
        return reward.correct_B(terms.rollout_gate_reward)
    group_B = reward.advantage(normalise=False)
    open_B = gates.agreement_gate(
        teacher_logprob_BT=experience.scores.teacher_logprob_BT,
        student_logprob_BT=experience.scores.student_logprob_BT,
        mask_BT=counted_BT, group_B=np.asarray(group_B), margin=terms.rollout_gate_margin,
    )  # fmt: skip
    return open_B & reward.known_B


def _by_token(
    experience: Experience, mask_BT: np.ndarray, terms: Terms, decode: Decode
) -> np.ndarray:
    """Return the factors of the config's rule, before they are rescaled; [B, T], 0 outside the mask."""
    scores, strength = experience.scores, terms.token_weight_strength
    gap_BT = np.abs(scores.teacher_logprob_BT - scores.student_logprob_BT)

    def early() -> np.ndarray:
        return token_factors.early_agreement(gap_BT=gap_BT, mask_BT=mask_BT, strength=strength)

    def pruned() -> np.ndarray:
        return token_factors.pruned(
            overlap_BT=scores.overlap_ratio_BT, mask_BT=mask_BT,
            threshold=terms.token_weight_threshold, drop=terms.token_weight_drop,
            least=terms.token_weight_least,
        )  # fmt: skip

    def steps() -> np.ndarray:
        step_BT = step_ids(experience.rollout, window=terms.token_weight_window, decode=decode)
        return token_factors.step_weights(
            gap_BT=gap_BT, step_BT=step_BT, mask_BT=mask_BT, strength=strength
        )

    def entropies() -> np.ndarray:
        rows_B = token_factors.likeliest_rows(
            teacher_logprob_BT=scores.teacher_logprob_BT, mask_BT=mask_BT,
            keep=terms.token_weight_keep,
        )  # fmt: skip
        return token_factors.entropy_factors(
            teacher_entropy_BT=scores.teacher_entropy_BT,
            student_entropy_BT=scores.student_entropy_BT,
            mask_BT=mask_BT & rows_B[:, None],
            teacher_strength=strength, student_strength=strength,
        )  # fmt: skip

    def uncertain() -> np.ndarray:
        score_BT = token_factors.uncertain_or_far(
            entropy_BT=scores.student_entropy_BT, divergence_BT=scores.reverse_kl_BT,
            mask_BT=mask_BT, quantile=terms.token_weight_quantile,
        )  # fmt: skip
        return token_factors.most(score_BT=score_BT, mask_BT=mask_BT, keep=terms.token_weight_keep)

    def compatible() -> np.ndarray:
        score_BT = token_factors.far_and_compatible(
            divergence_BT=scores.reverse_kl_BT, teacher_mass_BT=scores.statistic_BT,
            mask_BT=mask_BT, quantile=terms.token_weight_quantile,
        )  # fmt: skip
        return token_factors.most(score_BT=score_BT, mask_BT=mask_BT, keep=terms.token_weight_keep)

    def accepted() -> np.ndarray:
        return token_factors.accepted(
            accepted_BT=scores.statistic_BT, mask_BT=mask_BT, least=terms.token_weight_least
        )

    rules: dict[str, Callable[[], np.ndarray]] = {
        "iw": early, "prune": pruned, "step": steps, "fire": entropies, "tip": uncertain,
        "ta": compatible, "selectkd": accepted,
    }  # fmt: skip
    return rules[terms.token_rule]()
