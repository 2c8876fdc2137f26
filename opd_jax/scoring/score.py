"""Score rows with student and teacher, without an array [batch, time, vocabulary].

chunked.py is the only place, besides the sampler, that knows about the shift by one: the hidden state at
t-1 predicts token t. It iterates over chunks of tokens, computes the logits of one chunk in float32,
passes them to a function, and keeps only its result.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import losses
from opd_jax.aot import Program
from opd_jax.data import microbatches
from opd_jax.models import decoder
from opd_jax.models.config import ModelConfig
from opd_jax.models.decoder import Model
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.scoring import topk
from opd_jax.scoring.chunked import Readout, TokenFn, align, map_tokens, take
from opd_jax.shapes import check_shapes
from opd_jax.sharding.mesh import ONE, ROWS, WHOLE, Mesh
from opd_jax.types import Scores, Support, TeacherRows

IN_FLIGHT = 3  # micro-batches whose scores are on the device at one time, at most
# The teacher's mass on the student's top k; whether the student's likeliest id is in the teacher's top k.
STATISTICS = ("teacher_mass", "student_accepted")


class Models(flax.struct.PyTreeNode):
    """The models that read the same rows; None where there is none.

    Attributes:
      student: the model whose rollouts the rows are.
      teacher: scores the same responses, perhaps after prompts of its own (`TeacherRows`).
      reference: reads the student's rows; only with a teacher, from which it extrapolates.
    """

    student: Model
    teacher: Model | None = None
    reference: Model | None = None


class ScoreSpec(flax.struct.PyTreeNode):
    """What scoring is asked for. Numbers are static under jit, arrays are not.

    Attributes:
      top_k: k of the overlap metrics.
      token_chunk: most tokens whose logits exist at one time, on one replica.
      events: the ids and end tokens over which log-probs are normalised (see data.vocabulary).
      support: the name of a support (topk.SUPPORTS) and its own k, for losses over one; None without.
      statistic: a name of `STATISTICS` and its k, for token weights; None without.
      keep_hidden: keep the teacher's hidden states, for losses over the whole vocabulary; where one model
        scores alone, its own.
      tile: widths of micro-batches are multiples of it (hardware.tile).
    """

    top_k: int = flax.struct.field(pytree_node=False)
    token_chunk: int = flax.struct.field(pytree_node=False)
    events: Events = EVERY_ID
    support: tuple[str, int] | None = flax.struct.field(pytree_node=False, default=None)
    statistic: tuple[str, int] | None = flax.struct.field(pytree_node=False, default=None)
    keep_hidden: bool = flax.struct.field(pytree_node=False, default=False)
    tile: int = flax.struct.field(pytree_node=False, default=1)


def teacher_states(
    teacher: Model, tokens_BT: jax.Array, length_B: jax.Array, other: TeacherRows | None
) -> jax.Array:
    """Return the teacher's hidden states [B, T, D] for the student's rows, from its own rows if any."""
    if other is None:
        return decoder.hidden_states(teacher.params, teacher.config, tokens_BT, length_B)
    hidden = decoder.hidden_states(teacher.params, teacher.config, other.tokens_BT, other.length_B)
    return align(hidden, other.offset_B, tokens_BT.shape[1])


@partial(jax.jit, static_argnames=("config", "token_chunk", "vocabulary"))
def token_logprob(
    params: decoder.Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    token_chunk: int = 1024,
    vocabulary: int | None = None,
) -> jax.Array:
    """log p(tokens[b, t] | tokens[b, :t]) of right-padded rows; float32 [B, T], 0 at t = 0 and padding.

    `vocabulary` restricts the logits to the first ids (those that the tokenizers share).
    """
    check_shapes(tokens_BT=tokens_BT, length_B=length_B)
    out = map_tokens(
        lambda logprob_CV, token_C: {"logprob": take(logprob_CV, token_C)},
        [Readout(decoder.head(params), decoder.hidden_states(params, config, tokens_BT, length_B))],
        tokens_BT,
        token_chunk=token_chunk,
        events=Events(vocabulary=vocabulary),
    )
    return jnp.where(jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None], out["logprob"], 0.0)


def score(
    models: Models,
    tokens_BT: np.ndarray,
    length_B: np.ndarray,
    spec: ScoreSpec,
    *,
    microbatch_tokens: int,
    first_B: np.ndarray | None = None,
    teacher_rows: TeacherRows | None = None,
    mesh: Mesh = ONE,
    batch: int | None = None,
) -> Scores:
    """Score the same responses with all models, in one pass over chunks of tokens; see `Scores`.

    The tokens of row b that are scored are those from `first_B[b]` on (None: all but the first, which nothing
    predicts); the statistics of others are 0. `teacher_rows` holds the responses behind the teacher's own
    prompts, where those differ. Rows go through the models in micro-batches of at most `microbatch_tokens`
    tokens, which bounds the activations as `spec.token_chunk` bounds the logits; both apply to one replica
    of the `mesh`. With `batch` the micro-batches are those of so many rows, whatever the number here is.
    Returns host arrays of the shape of `tokens_BT`. (Nine arguments: what is scored, how, and in which parts.
    Each caller has them singly, so a record would be filled only to be taken apart here.)
    """
    tokens_BT, length_B = np.asarray(tokens_BT), np.asarray(length_B)
    first_B = np.ones_like(length_B) if first_B is None else np.asarray(first_B)
    out: Any = None

    def put(part: microbatches.MicroBatch, scores: Scores) -> None:
        nonlocal out
        if out is None:
            out = jax.tree.map(
                lambda x: np.zeros((*tokens_BT.shape, *x.shape[2:]), x.dtype), scores
            )
        jax.tree.map(partial(microbatches.scatter, part=part), out, mesh.fetch(scores))

    in_flight = []
    for part in microbatches.split(
        length_B, width=tokens_BT.shape[1], tokens=microbatch_tokens, teacher=teacher_rows,
        replicas=mesh.replicas, tile=spec.tile, batch=batch,
    ):  # fmt: skip
        tokens, length, first = microbatches.gather((tokens_BT, length_B, first_B), part)
        other = None if teacher_rows is None else microbatches.gather_teacher(teacher_rows, part)
        rows = mesh.rows((tokens, length, first, other))
        scores = score_part(models, *rows, spec, mesh=mesh)
        in_flight.append((part, scores))
        if len(in_flight) == IN_FLIGHT:  # two keep the device busy while one is fetched
            put(*in_flight.pop(0))
    for part, scores in in_flight:
        put(part, scores)
    return out


def programs(
    models: Models,
    batch: int,
    width: int,
    spec: ScoreSpec,
    *,
    microbatch_tokens: int,
    teacher_width: int = 0,
    mesh: Mesh = ONE,
) -> list[Program]:
    """Return every program that `score` compiles for `batch` rows of `width`, whatever their lengths.

    `teacher_width` is that of the teacher's own rows, 0 where it has none; the models' parameters may be
    shapes and dtypes alone.
    """
    out = []
    for part in microbatches.shapes(
        batch, width=width, tokens=microbatch_tokens, teacher_width=teacher_width,
        replicas=mesh.replicas, tile=spec.tile,
    ):  # fmt: skip
        length_B = np.zeros(part.count, np.int32)
        tokens_BT = np.zeros((part.count, part.width), np.int32)
        other = None
        if teacher_width:
            theirs_BT = np.zeros((part.count, part.teacher_width), np.int32)
            other = TeacherRows(tokens_BT=theirs_BT, length_B=length_B, offset_B=length_B)
        rows = mesh.row_structs((tokens_BT, length_B, length_B, other))
        given = (models, *rows, spec)
        name = f"score {part.count} x {part.width}"
        out.append(Program(name, score_part, given, {"mesh": mesh}))
    return out


@partial(jax.jit, static_argnames=("mesh",))
def score_part(
    models: Models,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    first_B: jax.Array,
    other: TeacherRows | None,
    spec: ScoreSpec,
    *,
    mesh: Mesh = ONE,
) -> Scores:
    """`score` of one micro-batch, traced once for each of its shapes."""
    each = mesh.per_replica(_score_rows, (WHOLE, ROWS, ROWS, ROWS, ROWS, WHOLE), ROWS)
    return each(models, tokens_BT, length_B, first_B, other, spec)


def _score_rows(
    models: Models,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    first_B: jax.Array,
    other: TeacherRows | None,
    spec: ScoreSpec,
) -> Scores:
    """`score_part` on one replica."""
    student, teacher, reference = models.student, models.teacher, models.reference
    position_1T = jnp.arange(tokens_BT.shape[1])[None]
    counts_BT = (position_1T >= first_B[:, None]) & (position_1T < length_B[:, None])
    hidden_BTD = decoder.hidden_states(student.params, student.config, tokens_BT, length_B)
    readouts = [Readout(decoder.head(student.params), hidden_BTD)]
    fn: TokenFn = _student_statistics
    if teacher is not None:
        head_VD = decoder.head(teacher.params)
        hidden_BTD = teacher_states(teacher, tokens_BT, length_B, other)
        readouts.append(Readout(head_VD, hidden_BTD, "teacher"))
        fn = partial(
            _pair_statistics, top_k=spec.top_k, support=spec.support, statistic=spec.statistic
        )
    if reference is not None:
        assert teacher is not None, "reference: it extrapolates from a teacher"
        states_BTD = decoder.hidden_states(reference.params, reference.config, tokens_BT, length_B)
        readouts.append(Readout(decoder.head(reference.params), states_BTD, "reference"))
    scores = map_tokens(
        fn, readouts, tokens_BT, counts_BT=counts_BT,
        token_chunk=spec.token_chunk, events=spec.events,
    )  # fmt: skip
    if not spec.keep_hidden:
        return scores
    return scores.replace(teacher_hidden_BTD=hidden_BTD)


def _student_statistics(student_CV: jax.Array, *, token_C: jax.Array) -> Scores:
    """Return the fields of `Scores` that need no teacher, for one chunk of tokens."""
    return Scores(
        student_logprob_BT=take(student_CV, token_C),
        student_entropy_BT=losses.entropy(logprob_BTV=student_CV[None])[0],
    )


def _pair_statistics(
    student_CV: jax.Array,
    teacher_CV: jax.Array,
    reference_CV: jax.Array | None = None,
    *,
    token_C: jax.Array,
    top_k: int,
    support: tuple[str, int] | None,
    statistic: tuple[str, int] | None = None,
) -> Scores:
    """Return all fields of `Scores` for one chunk of tokens, from the models' log-softmaxes."""
    most = max([top_k, *(asked[1] for asked in (support, statistic) if asked)])
    student_CX, student_ids_CX = topk.top_k(student_CV, most)
    _, teacher_ids_CX = topk.top_k(teacher_CV, most)
    overlap = _overlap(
        student_CX[:, :top_k],
        topk.gather(teacher_CV, student_ids_CX[:, :top_k]),
        topk.shared(student_ids_CX[:, :top_k], teacher_ids_CX[:, :top_k]),
    )
    chosen = number_C = None
    if statistic is not None:
        name, k = statistic
        if name == "teacher_mass":
            number_C = jnp.sum(jnp.exp(topk.gather(teacher_CV, student_ids_CX[:, :k])), axis=-1)
        else:
            first_C1 = student_ids_CX[:, :1]
            number_C = topk.shared(first_C1, teacher_ids_CX[:, :k])[:, 0].astype(jnp.float32)
    if support is not None:
        name, k = support
        ids_CX = topk.combine(student_ids_CX[:, :k], teacher_ids_CX[:, :k], name)
        chosen = Support(
            ids_BTX=ids_CX,
            student_BTX=topk.gather(student_CV, ids_CX),
            teacher_BTX=topk.gather(teacher_CV, ids_CX),
            teacher_rest_BT=topk.rest(teacher_CV, ids_CX),
        )
    return _student_statistics(student_CV, token_C=token_C).replace(
        teacher_logprob_BT=take(teacher_CV, token_C),
        teacher_entropy_BT=losses.entropy(logprob_BTV=teacher_CV[None])[0],
        reverse_kl_BT=losses.exact_kl(
            p_logprob_BTV=student_CV[None], q_logprob_BTV=teacher_CV[None]
        )[0],
        statistic_BT=number_C,
        support=chosen,
        reference_logprob_BT=None if reference_CV is None else take(reference_CV, token_C),
        **overlap,
    )


def _overlap(
    student_CX: jax.Array, teacher_CX: jax.Array, shared_CX: jax.Array
) -> dict[str, jax.Array]:
    """Overlap of the two top-k sets (arXiv 2604.13016, Eqs. 6-10), from the student's candidates.

    `student_CX`, `teacher_CX`: log-probs of the student's top-k ids; `shared_CX`: also in the
    teacher's top-k. ratio = |S_p and S_q| / k; advantage = sum p' (log q' - log p') / |S_p and S_q|
    with p', q' renormalised over the shared ids, 0 where none is shared; masses: sum of p and of q.
    """
    count_C = jnp.sum(shared_CX, axis=-1)
    student_mass_C = jnp.sum(jnp.where(shared_CX, jnp.exp(student_CX), 0.0), axis=-1)
    teacher_mass_C = jnp.sum(jnp.where(shared_CX, jnp.exp(teacher_CX), 0.0), axis=-1)
    some_C = count_C > 0
    log_p_CX = student_CX - jnp.log(jnp.where(some_C, student_mass_C, 1.0))[:, None]
    log_q_CX = teacher_CX - jnp.log(jnp.where(some_C, teacher_mass_C, 1.0))[:, None]
    gain_C = jnp.sum(jnp.where(shared_CX, jnp.exp(log_p_CX) * (log_q_CX - log_p_CX), 0.0), axis=-1)
    return {
        "overlap_ratio_BT": count_C / shared_CX.shape[-1],
        "overlap_advantage_BT": jnp.where(some_C, gain_C / jnp.maximum(count_C, 1), 0.0),
        "student_overlap_mass_BT": student_mass_C,
        "teacher_overlap_mass_BT": teacher_mass_C,
    }
