"""Bytes of each program of a step on one device: its arguments, and what it takes while it runs.

Arguments are counted from abstract trees (resident.py). Temporaries are what XLA keeps alive at its busiest
moment: shapes come from the code that computes them, how many arrays there are together from xla.py. Both
are held against compiled programs (docs/memory.md). Tracing the programs themselves would count their
arguments too, but takes seconds for each size that is tried in a search for one that fits.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.memory_plan import resident, xla
from opd_jax.memory_plan.workload import Workload
from opd_jax.models import ModelConfig, attention, flops, kv_cache, low_rank
from opd_jax.rollout.generate import Shapes
from opd_jax.scoring.chunked import chunk_shape
from opd_jax.types import GoldenRows, RolloutRows

Bytes = Mapping[str, float]
# Of a layer the weights that make keys and values: all that a prefill reads of the last one.
_ANCHORS = 5.25  # arrays [B, T] of 4 bytes a number in a SpanAnchors: five, and one of bools
_LOGITS_OF_SPANS = {
    "candidates": xla.LOGITS_CANDIDATES, "sorted": xla.LOGITS_SORTED, "matched": xla.LOGITS_MATCHED,
}  # fmt: skip
_KEYS_AND_VALUES = ("attention_norm", "key", "key_norm", "value")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of one program: those of its arguments and those of its temporaries, by kind."""

    arguments: Bytes
    temporaries: Bytes

    @property
    def argument_bytes(self) -> float:
        """All arguments."""
        return sum(self.arguments.values())

    @property
    def temporary_bytes(self) -> float:
        """All temporaries."""
        return sum(self.temporaries.values())


def slots_bytes(workload: Workload, slots: int) -> float:
    """Return the bytes of a device's decode slots: caches, and an id and a log-prob a token.

    The numbers that a slot has once (lengths, flags, a key: under 20 bytes) are left out.
    """
    return resident.cache_bytes(workload, slots) + 8.0 * slots * workload.width


def decode(workload: Workload, slots: int) -> Footprint:
    """One step of the token loop on so many slots: weights and slots in, slots donated.

    Where attention is not fused, its scores are against one block of the cache (kv_cache.block_widths).
    """
    model, tensor = workload.student, workload.layout.tensor
    logits = slots * model.vocab_size * 4.0
    working = slots * model.intermediate_size * workload.itemsize / tensor * xla.MLP_DECODE.count
    if not workload.fused:
        block = max(kv_cache.block_widths(workload.width))
        working += 4.0 * slots * model.num_heads * block / tensor * xla.SCORES_DECODE.count
        working += 8.0 * slots * workload.width * xla.ROWS_DECODE.count
    more = xla.LOGITS_NUCLEUS.count * workload.nucleus
    return Footprint(
        {
            "unstacked": resident.bytes_on_device(resident.unstacked(workload)),
            "caches": slots_bytes(workload, slots),
        },
        {"logits": logits * (xla.LOGITS_DECODE.count + more), "working": working},
    )


def prefill(workload: Workload, slots: int) -> Footprint:
    """The first prompts of so many slots: layers unrolled, keys and values placed as they are made."""
    model = workload.student
    shapes = Shapes.of(
        slots, slots=slots, prompt_tokens=workload.prompt,
        response_tokens=workload.response, chunk=None,
    )  # fmt: skip
    tokens, width = shapes.many * workload.prompt, workload.prompt
    layers = _Pass(workload, model, workload.itemsize, tokens, width, copied=workload.fused)
    return Footprint(
        {
            "unstacked": resident.bytes_on_device(_read_by_prefill(resident.unstacked(workload))),
            "caches": slots_bytes(workload, slots),
        },
        layers.busiest(),
    )


def score(workload: Workload) -> Footprint:
    """A micro-batch through student, then teacher, then chunks of the logits of both.

    With another tokenizer each model has programs of its own: of these the one with more temporaries.
    """
    if workload.teacher_vocabulary:
        return max((score(one) for one in workload.alone), key=lambda one: one.temporary_bytes)
    rows, roles = workload.score_rows, ["student"]
    given = {"student": resident.weight_bytes(workload, "student")}
    if workload.teacher is not None:
        given["teacher"] = resident.weight_bytes(workload, "teacher")
        roles.append("teacher")
    if workload.reference_scores:
        given["reference"] = resident.weight_bytes(workload, "reference")
        roles.append("reference")
    given["rows"] = 4.0 * rows * (workload.width + workload.teacher_width)
    moments = _passes(workload, roles, rows)
    # Of the reference only the sampled token is read: one chunk (tests/support/memory_152k.py).
    alone = int(workload.reference_scores)
    chunks = (len(roles) - alone) * xla.LOGITS_SCORE_PLAIN.count + alone
    if workload.fused:
        chunks = (len(roles) - alone) * xla.LOGITS_SCORE.count + alone
        chunks += xla.LOGITS_SUPPORT.count * (workload.support > 0 and not workload.replayed)
    # Hidden states that the update will read are results of the program: no temporary.
    returned = hidden_for_update(workload, rows) if workload.over_vocabulary else 0.0
    moments.append({
        "activations": sum(_hidden(workload, role, rows) for role in roles) - returned,
        "logits": chunks * _chunk(workload, workload.score_chunk, rows * workload.width),
        "weight copies": sum(resident.gathered_head(workload, role) for role in roles),
    })  # fmt: skip
    return Footprint(given, _busiest(moments))


def arrays_per_token(rows: Any) -> int:
    """Return how many arrays [B, T], of 4 bytes a number, every record of rows has; others may be None."""
    return sum(
        field.name.endswith("_BT") and field.default is dataclasses.MISSING
        for field in dataclasses.fields(rows)
    )


def hidden_for_update(workload: Workload, rows: int) -> float:
    """Return the bytes of the teacher's final hidden states of so many rows, laid out as the student's.

    Of a workload without a teacher, which is one of two models that score alone, they are its own.
    """
    role = "student" if workload.teacher is None else "teacher"
    size = getattr(workload, role).hidden_size * workload.itemsize_of(role)
    return 1.0 * rows * workload.width * size


def gradient(workload: Workload, *, golden: bool = False) -> Footprint:
    """A micro-batch forward and backward; the sum of gradients is donated and returned.

    The output matrix is cast once from float32, and its gradient is summed over the chunks in float32.
    """
    twice = golden and workload.golden_divergence and "sft" in workload.terms
    workload = workload.of_golden if golden else workload
    rows = workload.rollout_rows
    model, tokens = workload.student, rows * workload.width
    one = workload.layout.devices == 1
    trained = resident.masters(workload) if one else _updated(workload)
    arrays = 1.0 * arrays_per_token(GoldenRows if golden else RolloutRows)
    arrays += workload.gated + _ANCHORS * bool(workload.span_events)
    given = {"master" if one else "student": trained,
             "gradients": resident.gradients(workload),
             "rows": 4.0 * arrays * tokens}  # fmt: skip
    if workload.low_rank is not None:
        given["base"] = resident.base_bytes(workload)
    beside = workload.reference is not None and workload.reference_in_update
    others = ("reference",) * beside
    for role in others:
        given[role] = resident.weight_bytes(workload, role)
    hidden = xla.HIDDEN_UPDATE.count * _hidden(workload, "student", rows)
    hidden += sum(_hidden(workload, role, rows) for role in others)
    models, copies = 1 + len(others), 0.0
    given["rows"] += 4.0 * tokens * workload.support * workload.support_arrays
    if workload.over_vocabulary:
        given["teacher"] = resident.teacher_head(workload)
        given["rows"] += hidden_for_update(workload, rows)
        chunks, size = chunk_shape(tokens, workload.token_chunk)
        hidden += hidden_for_update(workload, rows) * (
            chunks * size > tokens
        )  # padding copies them
        models += 1
        copies += resident.gathered_head(workload, "teacher")
    layers = kept(workload, rows)
    # The output matrix beside adapters is frozen: no float32 copy of it, and no gradient.
    matrix = 1.0 * flops.head_parameters(model) * (workload.low_rank is None)
    cast = matrix * workload.itemsize * (workload.itemsize != 4)
    if not one:  # the compute weights' matrix is made float32 first
        cast += 4.0 * matrix * (workload.itemsize != 4)
    copies += sum(resident.gathered_head(workload, role) for role in ("student", *others))
    # Adapters in the compute dtype, where that is another one, and their gradients of all layers.
    copies += resident.adapter_bytes(workload) * (1 + (workload.itemsize != 4))
    # The supervised term and the divergence have one log-softmax each of the student's logits.
    logits = _logits_of_update(workload, models + twice)
    chunk = _chunk(workload, workload.token_chunk, tokens)
    if workload.span_events:
        logits = _LOGITS_OF_SPANS[workload.span_events].count
        chunk *= max(1.0, workload.teacher_vocabulary / workload.vocabulary)
    moments = [
        {
            "activations": layers + hidden,
            "logits": logits * chunk,
            "weight copies": cast + copies + 4.0 * matrix,
        },
        _with(_backward_layer(workload, tokens), activations=layers, weight_copies=4.0 * matrix),
    ]
    for moment in _passes(workload, others, rows):
        moments.append(_with(moment, activations=layers, weight_copies=cast))
    return Footprint(given, _busiest(moments))


def compute_weights(workload: Workload) -> Footprint:
    """The student's compute weights from its masters: the largest cast weight, before it is gathered."""
    sharded = workload.layout.student == "sharded" and workload.layout.fsdp > 1
    copied = workload.itemsize != 4 and not sharded
    return Footprint(
        {"master": resident.masters(workload)},
        {"weight copies": resident.largest_cast(workload) * copied},
    )


def gradient_sum(workload: Workload) -> Footprint:
    """The replicas' sums of gradients into one, sharded as the masters are."""
    return Footprint({"gradients": resident.gradients(workload)}, {})


def optimizer(workload: Workload) -> Footprint:
    """AdamW over the float32 state in place."""
    state = resident.state(workload)
    weights = resident.bytes_on_device(state.params)
    given = {
        "master": weights, "optimizer": resident.bytes_on_device(state.opt_state),
        "gradients": weights,
    }  # fmt: skip
    if state.average is not None:
        given["average"] = resident.bytes_on_device(state.average)
    copies = xla.ADAMW.count if workload.fused else xla.ADAMW_PLAIN.count
    return Footprint(given, {"working": copies * weights})


def kept(workload: Workload, rows: int) -> float:
    """Return the bytes that all layers keep for their backward pass, as `optim.remat` says.

    A layer keeps its input; "attention" what the fused kernel returned; "dots" also queries, keys,
    values, the output projection, gate and up; "none" all but the weights of plain
    attention, of which norms and rotations are float32.
    """
    c, tensor, i = workload.student, workload.layout.tensor, workload.itemsize
    tokens = rows * workload.width
    heads, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    statistics = 4.0 * c.num_heads * xla.STATISTICS_KEPT.count
    attended = heads * i + statistics if workload.fused else 0.0
    mlp, stream = c.intermediate_size * i, c.hidden_size * i
    more = {
        "full": 0.0,
        "attention": attended / tensor,
        "dots": (attended + (heads + 2 * keys) * i + xla.MLP_KEPT_DOTS.count * mlp) / tensor
        + stream,
        "none": xla.MLP_KEPT.count * mlp / tensor + xla.STREAM_KEPT.count * 4.0 * c.hidden_size,
    }[workload.remat]
    return c.num_layers * tokens * (stream + more + _kept_beside(workload))


def _kept_beside(workload: Workload) -> float:
    """Return the bytes a token and layer that adapters add to what a layer keeps.

    With "none" x A of every target; with "dots" that, and the product (x A) B beside x W.
    """
    if workload.low_rank is None or workload.remat not in ("dots", "none"):
        return 0.0
    found = 0.0
    adapters = low_rank.abstract_adapters(workload.student, workload.low_rank)["layers"]
    for pair in adapters.values():
        found += pair[low_rank.A].shape[-1]
        if workload.remat == "dots":
            found += pair[low_rank.B].shape[-1] / workload.layout.tensor
    return found * workload.itemsize


def _updated(workload: Workload) -> float:
    """Return the bytes of the compute weights that the update changes."""
    if workload.low_rank is not None:
        return resident.adapter_bytes(workload)
    return resident.weight_bytes(workload, "student")


def _read_by_prefill(unstacked: Any) -> Any:
    """Return the weights that a prefill reads: no logits are asked for, of the last layer keys and values."""
    *layers, last = unstacked["layers"]
    last = {name: last[name] for name in _KEYS_AND_VALUES if name in last}
    return unstacked["embed"], layers, last


def _logits_of_update(workload: Workload, models: int) -> float:
    """Return how many chunks of logits the update has at one time."""
    if not workload.fused:
        return xla.LOGITS_UPDATE_PLAIN.count * models
    cut = workload.student.vocab_size != workload.vocabulary
    return xla.LOGITS_UPDATE.count + max(models, 1 + xla.LOGITS_CUT.count * cut)


def _tokens(workload: Workload, role: str, rows: int) -> int:
    """Return the tokens of so many rows as the role reads them."""
    own = workload.teacher_width if role == "teacher" else 0
    return rows * (own or workload.width)


def _hidden(workload: Workload, role: str, rows: int) -> float:
    """Return the bytes of a role's final hidden states."""
    size = getattr(workload, role).hidden_size * workload.itemsize_of(role)
    return float(_tokens(workload, role, rows) * size)


def _chunk(workload: Workload, token_chunk: int, tokens: int) -> float:
    """Return the bytes of float32 logits of one chunk, where so many tokens are cut into chunks."""
    return 4.0 * chunk_shape(tokens, token_chunk)[1] * workload.vocabulary


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A forward pass of one model over tokens in rows of `width`.

    `copied`: whether a layer's weights are copied out of stacked ones.
    """

    workload: Workload
    model: ModelConfig
    itemsize: int
    tokens: int
    width: int
    copied: bool = True

    def busiest(self) -> dict[str, float]:
        """Return the bytes of a layer at work: in its MLP, or where queries meet keys in the plain form."""
        workload, model, tensor = self.workload, self.model, self.workload.layout.tensor
        layer = self.copied * flops.matrix_parameters(model) / model.num_layers
        count = (xla.STREAM_FORWARD if workload.fused else xla.STREAM_FORWARD_PLAIN).count
        stream = count * self.tokens * model.hidden_size * self.itemsize
        mlp = xla.MLP_FORWARD.count * self.tokens * model.intermediate_size * self.itemsize / tensor
        scores = xla.SCORES_FORWARD.count * self.tokens * _scores(workload, model, self.width)
        return {"working": stream + layer * self.itemsize / tensor + max(mlp, scores)}


def _passes(workload: Workload, roles: Sequence[str], rows: int) -> list[dict[str, float]]:
    """Return the busiest moment of each role's forward pass, beside the hidden states made before it."""
    moments, before = [], 0.0
    for role in roles:
        tokens, model = _tokens(workload, role, rows), getattr(workload, role)
        layers = _Pass(workload, model, workload.itemsize_of(role), tokens, tokens // rows)
        moments.append(_with(layers.busiest(), activations=before))
        before += _hidden(workload, role, rows)
    return moments


def _backward_layer(workload: Workload, tokens: int) -> dict[str, float]:
    """Return the bytes of a layer at work, backward, with what is computed again and its gradients."""
    c, tensor = workload.student, workload.layout.tensor
    scores = xla.SCORES_BACKWARD.count * tokens * _scores(workload, c, workload.width)
    mlp = xla.MLP_BACKWARD.count * tokens * c.intermediate_size * workload.itemsize / tensor
    stream = xla.STREAM_BACKWARD.count * tokens * c.hidden_size * workload.itemsize
    layer = flops.matrix_parameters(c) / c.num_layers / tensor
    frozen = workload.low_rank is not None  # no gradients of these weights
    layer *= (xla.LAYER_BACKWARD.count - frozen) * workload.itemsize
    return {"working": stream + mlp + scores + layer}


def _scores(workload: Workload, model: ModelConfig, width: int) -> float:
    """Return the bytes of float32 scores for each token of a row; 0 where attention is fused.

    They exist for one block of queries at a time, against all positions.
    """
    if workload.fused:
        return 0.0
    return 4.0 * model.num_heads * attention.block_size(width) / workload.layout.tensor


def _with(moment: dict[str, float], **more: float) -> dict[str, float]:
    """Return a moment with more bytes of the kinds named."""
    named = {name.replace("_", " "): size for name, size in more.items()}
    return {kind: moment.get(kind, 0.0) + named.get(kind, 0.0) for kind in {*moment, *named}}


def _busiest(moments: Sequence[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))
