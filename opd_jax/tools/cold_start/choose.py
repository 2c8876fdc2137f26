"""One solution to each problem out of several: a correct one first, then the one nearest to the student.

BRTS (2605.09725; teacher_selection.py of its code): a teacher may have many correct solutions, and those that
the student could nearly have written teach it most. Nearness is the overlap of `overlap_score`, or, as our
own alternative, the student's mean log-prob of the solution.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import numpy as np

from opd_jax import data, models, scoring
from opd_jax.data import golden_rows
from opd_jax.models.end_tokens import Events
from opd_jax.rollout import Batching, SamplingParams, row_keys, sample_responses

_TOKENS = 16_384  # tokens of a micro-batch of scoring, or one row
_CHUNK = 1024  # tokens whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class Student:
    """The student that solutions are chosen for, without its weights.

    Attributes:
      config, tokenizer, style: as those of the teacher (run.Plan).
      end: token that ends golden solutions. stop_ids: its end tokens.
      width: tokens of its longest prompt.
    """

    config: models.ModelConfig
    tokenizer: data.Tokenizer
    style: data.PromptStyle
    end: int
    stop_ids: tuple[int, ...]
    width: int

    @property
    def vocabulary(self) -> int:
        """Ids that its tokenizer knows."""
        return min(self.tokenizer.size, self.config.vocab_size)


def overlap_score(teacher_tokens: Sequence[int], student_topk: Sequence[Collection[int]]) -> float:
    """Return the share of the teacher's tokens that are in the student's top k at the same position.

    `teacher_tokens`: [T] ids of a solution; `student_topk`: [T', k] ids, the student's likeliest at each
    position of its own response. Positions that only one of the two has are left out; 0 where there is none.
    The two texts differ from some position on, and their positions are compared all the same: this is what
    the code of 2605.09725 does (found).
    """
    pairs = list(zip(teacher_tokens, student_topk, strict=False))
    return sum(token in likeliest for token, likeliest in pairs) / max(len(pairs), 1)


def choose(correct: Sequence[bool], score: Sequence[float]) -> int:
    """Return the index of the best score among the correct solutions, or of all where none is correct.

    The first one of equal scores. Raises ValueError without any solution.
    """
    among = [i for i, right in enumerate(correct) if right] or range(len(correct))
    return max(among, key=lambda i: score[i])


def overlaps(
    student: Student,
    params: models.Params,
    problems: Sequence[data.Problem],
    solutions: Sequence[Sequence[str]],
    *,
    key: jax.Array,
    top_k: int,
    budget: int,
) -> list[list[float]]:
    """Return `overlap_score` of the solutions to each problem with one response of the student.

    The student answers at temperature 1, in at most `budget` tokens. Solutions are compared as the student's
    tokenizer spells them, their end included.
    """
    model = models.Model(student.config, params)
    prompts = student.style.prompts(problems, student.tokenizer)
    sampled = sample_responses(
        model, prompts,
        SamplingParams(budget, stop_ids=student.stop_ids, vocabulary=student.vocabulary),
        keys=row_keys(key, len(prompts)), batching=Batching(max_prompt_tokens=student.width),
    )  # fmt: skip
    spec = scoring.ScoreSpec(
        top_k=top_k, token_chunk=_CHUNK, events=Events(vocabulary=student.vocabulary),
        support=("student", top_k),
    )  # fmt: skip
    scores = scoring.score(
        scoring.Models(model, model), sampled.tokens_BT, sampled.length_B, spec,
        microbatch_tokens=max(_TOKENS, sampled.tokens_BT.shape[1]), first_B=sampled.prompt_length_B,
    )  # fmt: skip
    assert scores.support is not None
    found = []
    for i, (problem, texts) in enumerate(zip(problems, solutions, strict=True)):
        likeliest = scores.support.ids_BTX[i, sampled.prompt_length_B[i] : sampled.length_B[i]]
        sets = [set(ids) for ids in likeliest.tolist()]
        found.append([overlap_score(ids, sets) for ids in _spelt(student, problem, texts)])
    return found


def likelihoods(
    student: Student,
    params: models.Params,
    problems: Sequence[data.Problem],
    solutions: Sequence[Sequence[str]],
) -> list[list[float]]:
    """Return the student's mean log-prob of a token of each solution, at the solution's own prefixes.

    It is our own alternative to 2605.09725's overlap: no position of one text is compared with another's.
    """
    prompts = student.style.prompts(problems, student.tokenizer)
    spelt = [_spelt(student, *pair) for pair in zip(problems, solutions, strict=True)]
    flat = [ids for several in spelt for ids in several]
    repeated = [p for p, several in zip(prompts, spelt, strict=True) for _ in several]
    width = max(len(p) + len(ids) for p, ids in zip(repeated, flat, strict=True))
    width = -(-width // 128) * 128  # few shapes
    tokens_BT, length_B, mask_BT = golden_rows(repeated, flat, width=width)
    events = Events(vocabulary=student.vocabulary)
    scores = scoring.score(
        scoring.Models(models.Model(student.config, params)), tokens_BT, length_B,
        scoring.ScoreSpec(top_k=1, token_chunk=_CHUNK, events=events),
        microbatch_tokens=max(_TOKENS, width),
        first_B=np.array([len(prompt) for prompt in repeated], np.int32),
    )  # fmt: skip
    total_B = np.where(mask_BT, scores.student_logprob_BT, 0.0).sum(axis=1)
    means = iter((total_B / mask_BT.sum(axis=1)).tolist())
    return [[next(means) for _ in several] for several in spelt]


def _spelt(student: Student, problem: data.Problem, texts: Sequence[str]) -> list[list[int]]:
    """Return solutions as golden data of the student: in its ids, with its end token."""
    asked = [dataclasses.replace(problem, solution=text) for text in texts]
    return [[*ids, student.end] for ids in student.style.golden(asked, student.tokenizer)]
