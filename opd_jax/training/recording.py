"""The recorded rollouts of a step as arrays of a file: only tokens that are there (docs/replay.md)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.grading.grader import Grade
from opd_jax.training.rewards import Rewards
from opd_jax.types import Rollout, Scores, Support

_GRADES = (*Grade, None)
_BYTES = {"tokens": 4, "sampler log-prob": 4, "teacher's log-prob": 4, "teacher's entropy": 4}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The rollouts of a step as they were recorded; arrays padded to the rows of a run.

    Attributes:
      rollout: the record of the sampler.
      teacher_logprob_BT, teacher_entropy_BT: float32; None where the loss has no teacher.
      support: the teacher's top-k ids and log-probs; its `student_BTX` is 0. None where not recorded.
      grades: verdicts about the answers. rewards: from a function or a column; None without.
    """

    rollout: Rollout
    teacher_logprob_BT: np.ndarray | None
    teacher_entropy_BT: np.ndarray | None
    support: Support | None
    grades: list[Grade | None]
    rewards: Rewards | None

    def scores(self, own: Scores) -> Scores:
        """Return the current student's scores, with those that the teacher gave when it was recorded."""
        return own.replace(
            teacher_logprob_BT=self.teacher_logprob_BT,
            teacher_entropy_BT=self.teacher_entropy_BT,
            support=self.support,
        )


def drift(rollout: Rollout, scores: Scores, mask_BT: np.ndarray) -> dict[str, float]:
    """Return `replay/drift`: the mean of log p_recorded(y) - log p(y) over the scored tokens.

    An estimate of KL(recorded student || current student); 0 where the student has not moved.
    """
    if not mask_BT.any():
        return {}
    gap_BT = rollout.sampler_logprob_BT - np.asarray(scores.student_logprob_BT)
    return {"replay/drift": float(np.mean(gap_BT[mask_BT], dtype=float))}


def bytes_per_token(places: int, *, teacher: bool) -> int:
    """Return the bytes of a response token on the disk; `places` ids of a support are recorded for it.

    A prompt token takes 4.
    """
    plain = sum(_BYTES.values()) if teacher else 8
    return plain + (8 * places + 4 if places else 0)


def pack(
    rollout: Rollout,
    scores: Scores,
    *,
    grades: Sequence[Grade | None],
    rewards: Rewards | None = None,
    places: int = 0,
) -> dict[str, np.ndarray]:
    """Return a step's rollouts as the arrays of a file: only tokens that are there, row after row.

    `rewards` are those of a function or a column; `places` ids of the teacher's support are kept.
    """
    response_BT = rollout.response_mask_BT
    arrays = {
        "prompt_length": rollout.prompt_length_B.astype(np.int32),
        "length": rollout.length_B.astype(np.int32),
        "outcome": rollout.outcome_B.astype(np.int32),
        "tokens": rollout.tokens_BT[_row_mask(rollout.length_B, rollout.tokens_BT.shape[1])],
        "sampler_logprob": rollout.sampler_logprob_BT[response_BT],
        "grade": np.array([_GRADES.index(grade) for grade in grades], np.int32),
    }
    if scores.teacher_logprob_BT is not None:
        arrays["teacher_logprob"] = np.asarray(scores.teacher_logprob_BT)[response_BT]
        arrays["teacher_entropy"] = np.asarray(scores.teacher_entropy_BT)[response_BT]
    if places:
        support = scores.support
        assert support is not None
        arrays["support_ids"] = np.asarray(support.ids_BTX)[response_BT]
        arrays["support_teacher"] = np.asarray(support.teacher_BTX)[response_BT]
        arrays["support_rest"] = np.asarray(support.teacher_rest_BT)[response_BT]
    if rewards is not None:
        arrays["reward"] = rewards.reward_B
        arrays["reward_known"] = rewards.known_B.astype(np.int32)
    return arrays


def unpack(arrays: dict[str, np.ndarray], *, width: int) -> Recorded:
    """Return what `pack` was given, padded to rows of `width` tokens."""
    prompt_B, length_B = arrays["prompt_length"], arrays["length"]
    row_BT = _row_mask(length_B, width)
    response_BT = row_BT & ~_row_mask(prompt_B, width)

    def padded(name: str, mask_BT: np.ndarray) -> np.ndarray | None:
        if (values := arrays.get(name)) is None:
            return None
        out = np.zeros((*mask_BT.shape, *values.shape[1:]), values.dtype)
        out[mask_BT] = values
        return out

    def required(name: str, mask_BT: np.ndarray) -> np.ndarray:
        out = padded(name, mask_BT)
        assert out is not None, name
        return out

    support = rewards = None
    if "support_ids" in arrays:
        teacher_BTX = required("support_teacher", response_BT)
        support = Support(
            ids_BTX=required("support_ids", response_BT),
            student_BTX=np.zeros_like(teacher_BTX),
            teacher_BTX=teacher_BTX,
            teacher_rest_BT=required("support_rest", response_BT),
        )
    if "reward" in arrays:
        rewards = Rewards(arrays["reward"], arrays["reward_known"].astype(bool))
    return Recorded(
        rollout=Rollout(
            tokens_BT=required("tokens", row_BT),
            length_B=length_B,
            prompt_length_B=prompt_B,
            sampler_logprob_BT=required("sampler_logprob", response_BT),
            outcome_B=arrays["outcome"],
        ),
        teacher_logprob_BT=padded("teacher_logprob", response_BT),
        teacher_entropy_BT=padded("teacher_entropy", response_BT),
        support=support,
        grades=[_GRADES[i] for i in arrays["grade"]],
        rewards=rewards,
    )


def _row_mask(length_B: np.ndarray, width: int) -> np.ndarray:
    return np.arange(width)[None] < length_B[:, None]
