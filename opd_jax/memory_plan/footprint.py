"""Bytes of each program of a step on one device: its arguments, and what it takes while it runs.

Arguments are counted exactly. Temporaries are what XLA keeps alive at its busiest place, written down
here from the programs' structure and held against compiled programs (docs/memory.md).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from opd_jax.memory_plan.workload import Job
from opd_jax.models import ModelConfig, flops, kv_cache
from opd_jax.rollout.generate import Shapes

Bytes = Mapping[str, float]
# How many arrays of a kind are alive together, as read from the buffers of compiled programs.
_MLP_FORWARD = 2.0
_MLP_BACKWARD = 4.0
_STREAM_BACKWARD = 5.0
_ADAMW_CPU, _ADAMW_GPU = 2.0, 0.0  # of the master weights: what is not computed in place
_PLAIN_KEPT = 3.0  # plain attention: scores, weights, and what the softmax needs
_PLAIN_BACKWARD = 2.0


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One program: bytes by kind of what it is given and of what it takes beside that."""

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


def weights(job: Job, role: str) -> float:
    """A role's compute weights on a device."""
    model = getattr(job, role)
    itemsize = job.itemsize if role == "student" else getattr(job, f"{role}_itemsize")
    return parameters(model, job.layout.tensor) * itemsize / job.layout.sharded(role)


def parameters(model: ModelConfig, tensor: int) -> float:
    """Trained numbers on a device where layers are divided over `tensor` and the vocabulary is whole."""
    ends = flops.head_parameters(model) * (1 if model.tie_embeddings else 2)
    return ends + (flops.all_parameters(model) - ends) / tensor


def master(job: Job) -> float:
    """One float32 number a parameter, divided over data x fsdp as well."""
    return 4.0 * parameters(job.student, job.layout.tensor) / job.layout.rows


def gradients(job: Job) -> float:
    """The running sum, float32: whole beside replicated weights, divided as sharded ones are."""
    return 4.0 * parameters(job.student, job.layout.tensor) / job.layout.sharded("student")


def caches(job: Job, rows: int) -> float:
    """Keys and values of so many rows, and the rows themselves (an id and a log-prob a token)."""
    cached = flops.cache_bytes_per_token(job.student, job.itemsize) / job.layout.tensor
    return rows * job.width * (cached + 8.0)


def head_rows(job: Job) -> float:
    """The teacher's output matrix once more, in the order of the student's ids."""
    assert job.teacher is not None
    size = job.vocabulary * job.teacher.hidden_size * job.teacher_itemsize
    return size / job.layout.sharded("teacher")


def head(job: Job) -> float:
    """The teacher's output matrix on a device."""
    assert job.teacher is not None
    size = 1.0 * flops.head_parameters(job.teacher) * job.teacher_itemsize
    return head_rows(job) if job.renumbered else size / job.layout.sharded("teacher")


def decode(job: Job, slots: int) -> Footprint:
    """The token loop: weights and state in, the state aliased; one token's logits and MLP at work.

    The plain form of attention has scores against one block of positions (models/cache.py).
    """
    model, tensor = job.student, job.layout.tensor
    logits = slots * model.vocab_size * 4.0
    working = slots * model.intermediate_size * job.itemsize / tensor
    if not job.fused:
        block = min(
            -(-job.width // (kv_cache.BLOCK * kv_cache.MOST_BLOCKS)) * kv_cache.BLOCK, job.width
        )
        working += 4.0 * slots * model.num_heads * block / tensor
        working += 8.0 * slots * job.width  # ids and log-probs, not in place
    return Footprint(
        {"unstacked": parameters(model, tensor) * job.itemsize, "caches": caches(job, slots)},
        {"logits": logits * (1.0 + job.nucleus), "working": working},  # and their probabilities
    )


def prefill(job: Job, slots: int) -> Footprint:
    """The first prompts through the model: layers unrolled, keys and values placed as they come."""
    model, layout = job.student, job.layout
    shapes = Shapes.of(
        slots, slots=slots, prompt_tokens=job.prompt, response_tokens=job.response, chunk=None
    )
    tokens = shapes.many * job.prompt
    # Of the last layer only keys and values are asked for; nor is the output matrix.
    last = model.hidden_size * (model.num_heads * model.head_dim + 3 * model.intermediate_size)
    head = flops.head_parameters(model) * (not model.tie_embeddings)
    given = parameters(model, layout.tensor) - last / layout.tensor - head
    return Footprint(
        {"unstacked": given * job.itemsize, "caches": caches(job, slots)},
        _forward_layer(job, model, job.itemsize, tokens, job.prompt, copied=job.fused),
    )


def score(job: Job) -> Footprint:
    """A micro-batch through student, then teacher, then chunks of both models' logits."""
    rows, roles = job.microbatch_rows, ["student"]
    given = {"student": weights(job, "student")}
    if job.teacher is not None:
        given["teacher"] = weights(job, "teacher") + _replaced_head(job)
        roles.append("teacher")
    given["rows"] = 4.0 * rows * (job.width + job.teacher_width)
    moments = _passes(job, roles, rows)
    chunks = len(roles) * 3.0  # logits, log-probs, their largest ids
    if job.fused:  # all in one; one more to strike ids out
        chunks = 1.0 * len(roles) + (job.support > 0)
    handed = kept_hidden(job, rows) if job.over_vocabulary else 0.0  # out, to the update
    moments.append({
        "activations": sum(_hidden(job, role, rows) for role in roles) - handed,
        "logits": chunks * _chunk(job, job.score_chunk, rows * job.width),
        "weight copies": sum(_gathered_head(job, role) for role in roles),
    })  # fmt: skip
    return Footprint(given, _busiest(moments))


def kept_hidden(job: Job, rows: int) -> float:
    """The teacher's final hidden states of so many rows, which scoring hands to the update."""
    assert job.teacher is not None
    return 1.0 * rows * job.width * job.teacher.hidden_size * job.teacher_itemsize


def gradient(job: Job, *, golden: bool = False) -> Footprint:
    """A micro-batch forward and backward; the sum of gradients comes in and goes out in place.

    The output matrix is cast once from float32, whose gradient is summed over the chunks in float32.
    """
    rows = job.golden_rows if golden else job.microbatch_rows
    model, tokens = job.student, rows * job.width
    one = job.layout.devices == 1
    given = {"master" if one else "student": _trained(job),
             "gradients": gradients(job), "rows": 16.0 * tokens}  # fmt: skip
    beside = ("reference",) * (job.reference is not None and not golden)
    for role in beside:
        given[role] = weights(job, role)
    hidden = 3.0 * _hidden(job, "student", rows)  # as cut into chunks, and the cotangent of it
    hidden += sum(_hidden(job, role, rows) for role in beside)
    models, copies = 1 + len(beside), 0.0
    if not golden:
        given["rows"] += 4.0 * tokens * job.support * job.support_arrays
    if job.over_vocabulary and not golden:
        given["teacher"] = head(job)
        given["rows"] += kept_hidden(job, rows)
        hidden += kept_hidden(job, rows) * (_padding(job.token_chunk, tokens) > 0)
        models += 1
        copies += _gathered_head(job, "teacher")
    layers = kept(job, rows)
    matrix = 1.0 * flops.head_parameters(model)
    cast = matrix * job.itemsize * (job.itemsize != 4)
    if not one:  # made float32 of the compute weights first
        cast += 4.0 * matrix * (job.itemsize != 4)
    alive = 1 + max(models, 1 + _cut(job, "student")) if job.fused else 2 * models
    copies += sum(_gathered_head(job, role) for role in ("student", *beside))
    moments = [
        {
            "activations": layers + hidden,
            "logits": alive * _chunk(job, job.token_chunk, tokens),
            "weight copies": cast + copies + 4.0 * matrix,
        },
        _with(_backward_layer(job, tokens), activations=layers, weight_copies=4.0 * matrix),
    ]
    for moment in _passes(job, beside, rows):
        moments.append(_with(moment, activations=layers, weight_copies=cast))
    return Footprint(given, _busiest(moments))


def compute_weights(job: Job) -> Footprint:
    """The student's compute weights from its masters: the largest cast weight, before it is gathered."""
    c = job.student
    layers = c.num_layers * c.hidden_size * c.intermediate_size / job.layout.tensor
    largest = max(layers, flops.head_parameters(c)) * job.itemsize / job.layout.rows
    copied = job.itemsize != 4 and job.layout.sharded("student") == 1
    return Footprint({"master": master(job)}, {"weight copies": largest * copied})


def gradient_sum(job: Job) -> Footprint:
    """The replicas' sums of gradients into one, divided as the masters are."""
    return Footprint({"gradients": gradients(job)}, {})


def optimizer(job: Job) -> Footprint:
    """AdamW over the float32 state in place."""
    state = master(job)
    given = {"master": state, "optimizer": 2 * state, "gradients": state}
    if job.teacher_follows == "average":
        given["average"] = state
    return Footprint(given, {"working": (_ADAMW_GPU if job.fused else _ADAMW_CPU) * state})


def kept(job: Job, rows: int) -> float:
    """What the layers keep for their backward pass, as `optim.remat` says, in all layers.

    A layer keeps its input; "attention" what the fused kernel returned; "dots" also queries, keys,
    values, the output projection, gate and up; "none" all, of which norms and rotations are float32.
    """
    c, tensor, i = job.student, job.layout.tensor, job.itemsize
    tokens = rows * job.width
    heads, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attended = heads * i + 4.0 * c.num_heads if job.fused else 0.0
    mlp, stream = c.intermediate_size * i, c.hidden_size * i
    beside = {
        "full": 0.0,
        "attention": attended / tensor,
        "dots": (attended + (heads + 2 * keys) * i + 2.0 * mlp) / tensor + stream,
        "none": 5.0 * mlp / tensor + 40.0 * c.hidden_size,
    }[job.remat]
    scores = _PLAIN_KEPT * _scores(job, c, job.width) if job.remat == "none" else 0.0
    return c.num_layers * tokens * (stream + beside + scores)


def _trained(job: Job) -> float:
    """What gradients are taken of: the float32 weights on one device, else the compute weights."""
    return master(job) if job.layout.devices == 1 else weights(job, "student")


def _replaced_head(job: Job) -> float:
    """Arguments more or less by a renumbered output matrix: it takes the place of an own one."""
    assert job.teacher is not None
    if not job.renumbered:
        return 0.0
    own = 1.0 * flops.head_parameters(job.teacher) * job.teacher_itemsize
    own /= job.layout.sharded("teacher")
    return head_rows(job) - (0.0 if job.teacher.tie_embeddings else own)


def _itemsize(job: Job, role: str) -> int:
    return job.itemsize if role == "student" else getattr(job, f"{role}_itemsize")


def _tokens(job: Job, role: str, rows: int) -> int:
    """Tokens of so many rows as the role reads them."""
    return rows * (job.teacher_width or job.width if role == "teacher" else job.width)


def _hidden(job: Job, role: str, rows: int) -> float:
    """Final hidden states."""
    size = getattr(job, role).hidden_size * _itemsize(job, role)
    return float(_tokens(job, role, rows) * size)


def _chunk(job: Job, chunk: int, tokens: int) -> float:
    """Float32 logits of one chunk of tokens."""
    return 4.0 * _even_chunk(chunk, tokens) * job.vocabulary


def _even_chunk(chunk: int, tokens: int) -> int:
    """Tokens of a chunk: even shares, as scoring.map_tokens makes them."""
    return -(-tokens // -(-tokens // chunk)) if tokens else 0


def _padding(chunk: int, tokens: int) -> int:
    """Tokens that are added to fill the last chunk."""
    return -tokens % max(_even_chunk(chunk, tokens), 1)


def _cut(job: Job, role: str) -> bool:
    """Whether a chunk's logits are cut to the ids that are scored."""
    rows = getattr(job, role).vocab_size
    return rows != job.vocabulary and not (role == "teacher" and job.renumbered)


def _gathered_head(job: Job, role: str) -> float:
    """The output matrix made whole where a device has a slice of it."""
    model = getattr(job, role)
    matrix = 1.0 * model.vocab_size * model.hidden_size * _itemsize(job, role)
    return matrix * (job.layout.sharded(role) > 1)


def _passes(job: Job, roles: Sequence[str], rows: int) -> list[dict[str, float]]:
    """The busiest moment of each role's forward pass, the states of those before it kept."""
    moments, before = [], 0.0
    for role in roles:
        tokens, model = _tokens(job, role, rows), getattr(job, role)
        layer = _forward_layer(job, model, _itemsize(job, role), tokens, tokens // rows)
        moments.append(_with(layer, activations=before))
        before += _hidden(job, role, rows)
    return moments


def _forward_layer(
    job: Job, model: ModelConfig, itemsize: int, tokens: int, width: int, *, copied: bool = True
) -> dict[str, float]:
    """A layer at work, forward: in its MLP, or where queries meet keys in the plain form.

    `copied`: its weights are taken out of stacked ones.
    """
    tensor = job.layout.tensor
    layer = copied * flops.matrix_parameters(model) / model.num_layers * itemsize / tensor
    stream = (1.0 if job.fused else 2.0) * tokens * model.hidden_size * itemsize + layer
    mlp = _MLP_FORWARD * tokens * model.intermediate_size * itemsize / tensor
    return {"working": stream + max(mlp, _PLAIN_KEPT * tokens * _scores(job, model, width))}


def _backward_layer(job: Job, tokens: int) -> dict[str, float]:
    """A layer at work, backward, with what is computed again, and its weights and their gradients."""
    c, tensor = job.student, job.layout.tensor
    again = 0.0 if job.remat == "none" else _PLAIN_KEPT
    scores = (again + _PLAIN_BACKWARD) * tokens * _scores(job, c, job.width)
    mlp = _MLP_BACKWARD * tokens * c.intermediate_size * job.itemsize / tensor
    stream = _STREAM_BACKWARD * tokens * c.hidden_size * job.itemsize
    layer = flops.matrix_parameters(c) / c.num_layers / tensor
    return {"working": stream + mlp + scores + 2 * layer * job.itemsize}


def _scores(job: Job, model: ModelConfig, width: int) -> float:
    """Of a token: attention's scores where it is not one kernel, float32, against all positions."""
    return 0.0 if job.fused else 4.0 * model.num_heads * width / job.layout.tensor


def _with(moment: dict[str, float], **more: float) -> dict[str, float]:
    """A moment with what is there beside."""
    named = {name.replace("_", " "): size for name, size in more.items()}
    return {kind: moment.get(kind, 0.0) + named.get(kind, 0.0) for kind in {*moment, *named}}


def _busiest(moments: Sequence[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))
