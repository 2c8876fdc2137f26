"""Records that the packages exchange. Dimension letters: opd_jax/shapes.py.

Rows are `prompt ++ response ++ padding`, right-padded; `length` and `prompt_length` are the positions
where row and prompt end. Index t of every per-token array refers to token t of its row:
`logprob[b, t] = log p(tokens[b, t] | tokens[b, :t])`; entries outside the response are meaningless.
"""

import dataclasses
from enum import IntEnum
from typing import Any

import flax.struct
import jax
import numpy as np

# A jax.Array or a NumPy array: records are built on the host and passed to jitted functions directly.
Array = Any


class Outcome(IntEnum):
    """Why a rollout ended. EOS or REPETITION at the last token of the budget is not BUDGET."""

    EOS = 0
    BUDGET = 1
    REPETITION = 2


@dataclasses.dataclass(frozen=True)
class Ends:
    """The tokens that end a response: each model's own set, as columns of its logits.

    Attributes:
      id: the student's id that stands for all of them; golden solutions end with it.
      student: the student's set, which contains `id`.
      teacher, reference: those of the other models; () where there is no such model.
    """

    id: int
    student: tuple[int, ...]
    teacher: tuple[int, ...] = ()
    reference: tuple[int, ...] = ()

    @property
    def one_token(self) -> bool:
        """Whether `id` is the only end token of every model, so that nothing needs merging."""
        return all(own in ((), (self.id,)) for own in (self.student, self.teacher, self.reference))


class Rollout(flax.struct.PyTreeNode):
    """Sampled rows, host arrays in the order of the prompts.

    Attributes:
      tokens_BT: int32, prompt ++ response ++ zeros.
      length_B: int32, prompt + response tokens, the end token included.
      prompt_length_B: int32.
      sampler_logprob_BT: float32, log-prob of each sampled token under the full distribution of the
        weights that sampled it, over the same events as the scorer's; 0 outside the response.
      outcome_B: int32, an `Outcome` each.
    """

    tokens_BT: np.ndarray
    length_B: np.ndarray
    prompt_length_B: np.ndarray
    sampler_logprob_BT: np.ndarray
    outcome_B: np.ndarray

    @property
    def response_mask_BT(self) -> np.ndarray:
        """True on response tokens, the end token included."""
        position_T = np.arange(self.tokens_BT.shape[1])
        return (position_T >= self.prompt_length_B[:, None]) & (position_T < self.length_B[:, None])

    @property
    def response_length_B(self) -> np.ndarray:
        """Response tokens of each row, the end token included."""
        return self.length_B - self.prompt_length_B

    def response(self, row: int) -> list[int]:
        """Response ids of one row, the end token included."""
        return self.tokens_BT[row, self.prompt_length_B[row] : self.length_B[row]].tolist()

    def responses(self) -> list[list[int]]:
        """Response ids of every row."""
        return [self.response(row) for row in range(len(self.length_B))]

    def prompt(self, row: int) -> list[int]:
        """Prompt ids of one row."""
        return self.tokens_BT[row, : self.prompt_length_B[row]].tolist()


class Support(flax.struct.PyTreeNode):
    """The ids of a support at each token's prefix, with both models' log-probs; no gradients.

    Attributes:
      ids_BTX: int32, -1 in empty places.
      student_BTX, teacher_BTX: float32 log-probs of the full vocabulary, -inf in empty places.
      teacher_rest_BT: float32, log of the teacher's tail mass, outside the support.
    """

    ids_BTX: Array
    student_BTX: Array
    teacher_BTX: Array
    teacher_rest_BT: Array


class SpanAnchors(flax.struct.PyTreeNode):
    """Where the divergence of each span stands, and the teacher's side of it; arrays [B, T].

    The anchor of a span is one token of each model: its first, or its last (losses.span_divergence).

    Attributes:
      span_BT: int32, the span of each of the student's tokens in its row; -1 where none is compared.
      anchor_BT: bool, the student's anchors.
      size_BT: float32, the student's tokens in the span of each token.
      teacher_token_BT: int32, at the student's anchors: the teacher's token at its own anchor.
      teacher_rest_BT, teacher_size_BT: float32, there: the sum of the log-probs of the teacher's other tokens
        of the span, and how many tokens it has.
    """

    span_BT: Array
    anchor_BT: Array
    size_BT: Array
    teacher_token_BT: Array
    teacher_rest_BT: Array
    teacher_size_BT: Array


class SpanScores(flax.struct.PyTreeNode):
    """Log-probs of spans of text, where student and teacher have different tokenizers; host arrays [B, T].

    Attributes:
      span_BT: int32, the span of each of the student's tokens in its row; -1 where none is compared.
      bytes_BT: int32, bytes of text of each token.
      size_BT, teacher_size_BT: float32, the student's and the teacher's tokens in the span of each token.
      student_logprob_BT, teacher_logprob_BT: float32, of the span of each token: the sum over its tokens.
      anchors: inputs of a divergence by spans; None where no term has one.
    """

    span_BT: Array
    bytes_BT: Array
    size_BT: Array
    teacher_size_BT: Array
    student_logprob_BT: Array
    teacher_logprob_BT: Array
    anchors: SpanAnchors | None = None


class Scores(flax.struct.PyTreeNode):
    """Statistics of student and teacher at each token of a row; all [B, T], float32, no gradients.

    Attributes:
      student_logprob_BT, teacher_logprob_BT: of the sampled token.
      student_entropy_BT, teacher_entropy_BT: of the full distribution, in nats.
      reverse_kl_BT: KL(student || teacher) over the full vocabulary.
      overlap_ratio_BT: share of the student's top-k that is in the teacher's top-k.
      overlap_advantage_BT: mean over the shared ids of p (log q - log p), renormalised over them.
      student_overlap_mass_BT, teacher_overlap_mass_BT: probability that each puts on the shared ids.
      statistic_BT: one more number, which a token weight asks for (see scoring.ScoreSpec); None without.
      support: inputs of a loss over a support; None where no term has one.
      teacher_hidden_BTD: the teacher's final hidden states, in its compute dtype, laid out as the
        student's rows, for losses over the full vocabulary; None where no term needs them. With another
        tokenizer the states before a span's anchors stand at the same place, and others are 0.
      reference_logprob_BT: of the sampled token; None where nothing is extrapolated.
      spans: of a teacher with another tokenizer, which has no log-prob of a single token of the student's:
        all other fields of the teacher are None then. None where the two share ids.

    All but the student's two are None where there is no teacher.
    """

    student_logprob_BT: Array
    student_entropy_BT: Array
    teacher_logprob_BT: Array = None
    teacher_entropy_BT: Array = None
    reverse_kl_BT: Array = None
    overlap_ratio_BT: Array = None
    overlap_advantage_BT: Array = None
    student_overlap_mass_BT: Array = None
    teacher_overlap_mass_BT: Array = None
    statistic_BT: Array = None
    support: Support | None = None
    teacher_hidden_BTD: Array = None
    reference_logprob_BT: Array = None
    spans: SpanScores | None = None


class TeacherRows(flax.struct.PyTreeNode):
    """The same responses after the teacher's own prompts, in the teacher's ids.

    Attributes:
      tokens_BT: int32, with a width of their own.
      length_B: int32.
      offset_B: int32, the teacher's prompt length minus the student's: token t of the student's row
        is token t + offset of this one.
    """

    tokens_BT: Array
    length_B: Array
    offset_B: Array


@dataclasses.dataclass(frozen=True)
class TextRows:
    """The same responses after the teacher's own prompts, in the tokens of its own tokenizer; host arrays.

    Attributes:
      tokens_BT, length_B: int32, the teacher's rows, with a width W of their own.
      first_B: int32, the teacher's prompt lengths.
      teacher_span_BT: int32 [B, W], the span of each of these tokens; -1 where none is compared.
      span_BT, bytes_BT: int32 [B, T], of the student's tokens, as in `SpanScores`.
    """

    tokens_BT: np.ndarray
    length_B: np.ndarray
    first_B: np.ndarray
    teacher_span_BT: np.ndarray
    span_BT: np.ndarray
    bytes_BT: np.ndarray


class Frozen(flax.struct.PyTreeNode):
    """Weights that a loss reads and never changes; None where no term needs them.

    Of the teacher this is only the output matrix (decoder.head_alone): the rows contain its hidden states.
    `base` is what the student's adapters stand beside, where these are trained (models/low_rank.py).
    """

    reference: Any = None
    teacher: Any = None
    base: Any = None


class RolloutRows(flax.struct.PyTreeNode):
    """Rollouts as inputs of the update.

    Attributes:
      tokens_BT, length_B: int32.
      weight_BT: float32, each token's weight in the mean; 0 outside the response, sums to 1 over
        the global batch.
      advantage_BT, sampler_logprob_BT: float32, constants.
      teacher_hidden_BTD: as in `Scores`.
      support: of each token's prefix, for losses over a support; None where no term has one.
      support_advantage_BTX: float32, constant, of each id of the support.
      divergence_gate_BT: float32, factor of each token's divergence; None without a gate.
      token_factor_BT: float32, factor of each token's weight in every term; None without. On the host only:
        `training.batch.share` multiplies it into `weight_BT`.
      spans: for a divergence by spans of text; None without.
    """

    tokens_BT: Array
    length_B: Array
    weight_BT: Array
    advantage_BT: Array
    sampler_logprob_BT: Array
    teacher_hidden_BTD: Array = None
    support: Support | None = None
    support_advantage_BTX: Array = None
    divergence_gate_BT: Array = None
    token_factor_BT: Array = None
    spans: SpanAnchors | None = None


class GoldenRows(flax.struct.PyTreeNode):
    """Golden solutions as inputs of the update; fields as in `RolloutRows`.

    Attributes:
      tokens_BT, length_B, weight_BT: of all tokens of the solutions, as the supervised term counts them.
      divergence_weight_BT: likewise for the divergence, which counts those that both models score; None,
        as are the next two, where no term has a divergence on golden solutions.
      teacher_hidden_BTD, support: for that divergence.
    """

    tokens_BT: Array
    length_B: Array
    weight_BT: Array
    divergence_weight_BT: Array = None
    teacher_hidden_BTD: Array = None
    support: Support | None = None


class TrainState(flax.struct.PyTreeNode):
    """The state that training changes, as a checkpoint stores it.

    Attributes:
      step: int32, number of updates that the optimizer has applied. A skipped update does not count.
        This is not the run's step, which counts batches of rollouts.
      params: float32 master weights.
      opt_state: Optax's.
      average: float32 moving average of `params`, or a copy made every so many updates, where that is the
        teacher, else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None
