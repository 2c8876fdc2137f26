"""Seconds of a step on some devices, from operations, bytes and links; nothing is measured here.

Of each stage: at least max(operations / rate, bytes / bandwidth) + kernels' latency + communication. What
a stage is expected to take is that over `EFFICIENCY`. Counted as computed, recomputation included;
per device, whose share is the rows and the weights that the layout gives it.
"""

import dataclasses
import math

import numpy as np

from opd_jax.hardware import Device
from opd_jax.memory_plan import footprint
from opd_jax.memory_plan.workload import Job
from opd_jax.models import ModelConfig
from opd_jax.models import flops as account
from opd_jax.models.flops import Work

# Of these floors, what good programs are reported to reach on Hopper GPUs: generation at full batches
# and products of long rows. An estimate: no run of this project on a GPU stands behind it.
EFFICIENCY = {"rollout": 0.65, "score": 0.65, "update": 0.6}
_KERNELS_A_LAYER = 14  # of one decode step, in the program compiled for an H200
_COLLECTIVE_S = 10e-6  # latency of one collective
_DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class StageTime:
    """One stage on one device: seconds by cause, and how many there are at least and as expected."""

    name: str
    compute_s: float
    memory_s: float
    latency_s: float
    communication_s: float

    @property
    def floor_s(self) -> float:
        """At least."""
        return max(self.compute_s, self.memory_s) + self.latency_s + self.communication_s

    @property
    def expected_s(self) -> float:
        """What lies over the kernels' latency and the links is expected to be reached in part."""
        rate = EFFICIENCY[self.name]
        return max(self.compute_s, self.memory_s) / rate + self.latency_s + self.communication_s

    @property
    def bound(self) -> str:
        """What most of the time goes into."""
        parts = {
            "operations": self.compute_s, "memory": self.memory_s, "latency": self.latency_s,
            "communication": self.communication_s,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step: its stages, the tokens that are generated in it, and the run's steps."""

    stages: tuple[StageTime, ...]
    tokens: float
    steps: int

    @property
    def floor_s(self) -> float:
        """At least."""
        return sum(stage.floor_s for stage in self.stages)

    @property
    def expected_s(self) -> float:
        """As expected."""
        return sum(stage.expected_s for stage in self.stages)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second of the whole step, as expected."""
        return self.tokens / self.expected_s

    @property
    def days(self) -> float:
        """The whole run, as expected; evaluations and checkpoints left out."""
        return self.steps * self.expected_s / _DAY


def step_time(job: Job, device: Device, *, mean_response: float | None = None) -> StepTime:
    """A step in which every response reaches the budget, or lengths are spread evenly around a mean.

    Evenly: from 1 to 2 x `mean_response` - 1, which must not be above the budget.
    """
    rows = -(-job.batch // job.layout.rows)
    length_B = _lengths(rows, job.response, mean_response)
    stages = []
    if job.rollouts:
        stages = [rollout(job, device, length_B), score(job, device, length_B)]
    stages.append(update(job, device, length_B))
    tokens = float(length_B.sum()) * min(job.layout.rows, job.batch) if job.rollouts else 0.0
    return StepTime(tuple(stages), tokens, job.steps)


def rollout(job: Job, device: Device, length_B: np.ndarray) -> StageTime:
    """Prompts, then a token at a time in refilled slots: weights once a step, live positions once."""
    model, tensor = job.student, job.layout.tensor
    steps = _makespan(length_B, job.device_slots)
    read = _read(model, tensor)
    positions = float((length_B * job.prompt + length_B * (length_B - 1) / 2).sum())
    tokens = float(length_B.sum())
    cached = account.cache_bytes_per_token(model, job.itemsize)
    prompts = account.prefill(model, np.full(len(length_B), job.prompt), itemsize=job.itemsize)[0]
    flops = 2.0 * read * tokens
    flops += (prompts.flops + account.attention_flops(model, positions)) / tensor
    moved = steps * job.itemsize * read
    moved += (prompts.bytes + cached * (positions + tokens)) / tensor
    kernels = _KERNELS_A_LAYER * model.num_layers * device.kernel_s * steps
    collectives = 2 * model.num_layers * steps if tensor > 1 else 0
    sent = collectives * job.device_slots * model.hidden_size * job.itemsize
    return StageTime(
        "rollout",
        flops / device.flops_per_s,
        moved / device.bytes_per_s,
        kernels,
        _reduced(sent, tensor, device) + collectives * _COLLECTIVE_S
        + _gathers(job, "student", model, 1, job.itemsize, device),
    )  # fmt: skip


def score(job: Job, device: Device, length_B: np.ndarray) -> StageTime:
    """A pass of the student and one of the teacher over whole rows, with the logits of every token."""
    works = [_pass(job.student, job, length_B, job.itemsize)]
    gathered = _gathers(job, "student", job.student, _parts(job, length_B), job.itemsize, device)
    if job.teacher is not None:
        works.append(_pass(job.teacher, job, length_B, job.teacher_itemsize))
        gathered += _gathers(
            job, "teacher", job.teacher, _parts(job, length_B), job.teacher_itemsize, device
        )
    models = [job.student] + [job.teacher] * (job.teacher is not None)
    sent = sum(_layer_traffic(job, model, length_B, 2) for model in models if model)
    return _stage("score", works, device, _reduced(sent, job.layout.tensor, device) + gathered)


def update(job: Job, device: Device, length_B: np.ndarray) -> StageTime:
    """Forward, backward with what is computed again, models beside; then one reduction and AdamW."""
    model = job.student
    works, sent, gathered = [], 0.0, 0.0
    kinds = [length_B] * job.rollouts
    if job.golden:  # golden solutions are taken to be as long as the responses
        golden = -(-job.golden * job.updates // job.layout.rows)
        kinds.append(length_B[np.linspace(0, len(length_B) - 1, golden).astype(int)])
    for lengths in kinds:
        works.append(_learning(job, lengths))
        again = 2 if job.remat in ("attention", "full") else 0
        sent += _layer_traffic(job, model, lengths, 4 + again)
        passes = 2 * _parts(job, lengths)
        gathered += _gathers(job, "student", model, passes, job.itemsize, device)
        if job.layout.student == "sharded":  # gradients of each micro-batch, float32
            gathered += _gathers(job, "student", model, passes / 2, 4, device)
    if job.rollouts and job.over_vocabulary and job.teacher is not None:
        once = 2.0 * account.head_parameters(job.teacher)  # logits, made again backward
        works.append(
            Work(2 * once * _padded(job, length_B), job.itemsize * once * _parts(job, length_B))
        )
    if job.rollouts and job.reference is not None:
        other = job.reference
        works.append(_pass(other, job, length_B, job.itemsize, heads=2))
        sent += _layer_traffic(job, other, length_B, 2)
        gathered += _gathers(job, "reference", other, _parts(job, length_B), job.itemsize, device)
    parameters = footprint.parameters(model, job.layout.tensor)
    works.append(Work(0.0, job.updates * 28.0 * parameters / job.layout.rows))
    traffic = job.updates * _once_a_step(job, parameters, device)
    return _stage(
        "update", works, device,
        _reduced(sent, job.layout.tensor, device) + gathered + traffic,
    )  # fmt: skip


def _learning(job: Job, length_B: np.ndarray) -> Work:
    """Forward and backward: three times the forward's products, and what `remat` computes again.

    The logits of a chunk are always made again. Fused attention makes its scores again backward:
    2.5 times the forward's.
    """
    model, whole_B = job.student, length_B + job.prompt
    tokens = _padded(job, length_B)
    pairs = float((whole_B * (whole_B + 1) / 2).sum())
    again = job.remat in ("attention", "full")
    tensor = job.layout.tensor
    layers = account.matrix_parameters(model) / tensor
    products = 2.0 * tokens * (layers * (3 + again) + 4 * account.head_parameters(model))
    attention = account.attention_flops(model, pairs) * (3.5 + (job.remat == "full")) / tensor
    passes = (3 + again) * _parts(job, length_B)
    return Work(products + attention, passes * job.itemsize * _read(model, tensor))


def _pass(
    model: ModelConfig, job: Job, length_B: np.ndarray, itemsize: int, *, heads: int = 1
) -> Work:
    whole_B = length_B + job.prompt
    pairs = float((whole_B * (whole_B + 1) / 2).sum())
    tensor = job.layout.tensor
    weights = _read(model, tensor, heads=heads)
    return Work(
        2.0 * weights * _padded(job, length_B) + account.attention_flops(model, pairs) / tensor,
        itemsize * weights * _parts(job, length_B),
    )


def _read(model: ModelConfig, tensor: int, *, heads: int = 1) -> float:
    """Weights in matrices that a device reads in a pass: layers divided over `tensor`, logits whole."""
    return account.matrix_parameters(model) / tensor + heads * account.head_parameters(model)


def _stage(name: str, works: list[Work], device: Device, communication_s: float) -> StageTime:
    """Pieces of work one after another."""
    flops = sum(work.flops for work in works)
    moved = sum(work.bytes for work in works)
    return StageTime(
        name, flops / device.flops_per_s, moved / device.bytes_per_s, 0.0, communication_s
    )


def _once_a_step(job: Job, parameters: float, device: Device) -> float:
    """Gradients summed and divided (float32), new compute weights handed round; seconds.

    Replicated weights: over data x fsdp. Sharded ones: over data, of each fsdp part.
    """
    layout = job.layout
    if layout.student == "sharded":
        group, share = layout.data, parameters / layout.fsdp
    else:
        group, share = layout.rows, parameters
    bytes_ = share * (4 + job.itemsize) * (group - 1) / group
    return bytes_ / rate(group * layout.tensor, device) + 2 * _COLLECTIVE_S * (group > 1)


def _gathers(
    job: Job, role: str, model: ModelConfig, times: float, itemsize: int, device: Device
) -> float:
    """Seconds of gathering a role's sharded weights so many times; 0 where they are replicated."""
    layout = job.layout
    if getattr(layout, role) != "sharded" or layout.fsdp == 1:
        return 0.0
    bytes_ = footprint.parameters(model, layout.tensor) * itemsize
    seconds = bytes_ * (layout.fsdp - 1) / layout.fsdp / rate(layout.fsdp * layout.tensor, device)
    return times * (seconds + model.num_layers * _COLLECTIVE_S)


def _layer_traffic(job: Job, model: ModelConfig, length_B: np.ndarray, times: int) -> float:
    """Bytes that `times` reductions a layer over `tensor` sum: the residual stream of every token."""
    if job.layout.tensor == 1:
        return 0.0
    return times * model.num_layers * _padded(job, length_B) * model.hidden_size * job.itemsize


def _reduced(bytes_: float, group: int, device: Device) -> float:
    """Seconds of summing so many bytes over a group, everywhere: 2 (n - 1) / n of them a link."""
    return 2 * bytes_ * (group - 1) / group / rate(group, device)


def rate(group: int, device: Device) -> float:
    """Bytes a second of a collective over so many neighbours; beyond a node all its ports work."""
    if group <= device.per_node:
        return device.link_bytes_per_s
    return min(device.link_bytes_per_s, device.network_bytes_per_s * device.per_node)


def _lengths(rows: int, budget: int, mean: float | None) -> np.ndarray:
    if mean is None:
        return np.full(rows, budget, np.int64)
    longest = min(2 * mean - 1, budget)
    return np.ceil(longest * (np.arange(rows) + 1) / rows).astype(np.int64)


def _makespan(length_B: np.ndarray, slots: int) -> int:
    """Decode steps until all are done: at least the longest, and at least what the slots can hold."""
    return max(int(length_B.max()), math.ceil(length_B.sum() / min(slots, len(length_B))))


def _padded(job: Job, length_B: np.ndarray) -> float:
    """Tokens of the rows as the models see them: each padded to a quarter of the width."""
    quarter = -(-job.width // 4)
    return float(np.minimum(np.ceil((length_B + job.prompt) / quarter) * quarter, job.width).sum())


def _parts(job: Job, length_B: np.ndarray) -> int:
    """Micro-batches."""
    return max(math.ceil(_padded(job, length_B) / job.microbatch_tokens), 1)
