"""Lower bounds of a step's time on some devices, from operations, bytes and links. Nothing is measured.

The lower bound of a stage is max(operations / rate, bytes / bandwidth) + latency of kernels +
communication, for one device's share of the rows and weights, recomputation included. The estimate
divides the first of these three by an assumed efficiency (`EFFICIENCY`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from opd_jax.data import microbatches
from opd_jax.hardware import Device
from opd_jax.memory_plan import resident, xla
from opd_jax.memory_plan.workload import Workload
from opd_jax.models import ModelConfig
from opd_jax.models import flops as account
from opd_jax.models.flops import Work

# Share of a device's rates that good programs are reported to reach on Hopper GPUs, in generation at full
# batches and in products of long rows. An assumption: this project has measured none of them on a GPU.
EFFICIENCY = {"rollout": 0.65, "score": 0.65, "update": 0.6}
_COLLECTIVE_S = 10e-6  # latency of one collective
_DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class StageTime:
    """One stage on one device: seconds by cause, the lower bound that they make, and an estimate."""

    name: str
    compute_s: float
    memory_s: float
    latency_s: float
    communication_s: float

    @property
    def lower_bound_s(self) -> float:
        """Seconds if the stage reaches the device's rates."""
        return max(self.compute_s, self.memory_s) + self.latency_s + self.communication_s

    @property
    def expected_s(self) -> float:
        """Estimate: seconds if products and reads reach `EFFICIENCY` of the device's rates."""
        rate = EFFICIENCY[self.name.split()[0]]
        return max(self.compute_s, self.memory_s) / rate + self.latency_s + self.communication_s

    @property
    def bound(self) -> str:
        """The cause that takes most of the time."""
        parts = {
            "operations": self.compute_s, "memory": self.memory_s, "latency": self.latency_s,
            "communication": self.communication_s,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Stages of a step, the tokens that it generates, and the number of steps of the run."""

    stages: tuple[StageTime, ...]
    tokens: float
    steps: int

    @property
    def lower_bound_s(self) -> float:
        """Sum of the stages' lower bounds."""
        return sum(stage.lower_bound_s for stage in self.stages)

    @property
    def expected_s(self) -> float:
        """Sum of the stages' estimates."""
        return sum(stage.expected_s for stage in self.stages)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of the step, by the estimate."""
        return self.tokens / self.expected_s

    @property
    def days(self) -> float:
        """Days of the run by the estimate, without evaluations and checkpoints."""
        return self.steps * self.expected_s / _DAY


def step_time(
    workload: Workload, device: Device, *, mean_response: float | None = None
) -> StepTime:
    """A step in which every response reaches the budget, or lengths are spread evenly around a mean.

    Evenly: from 1 to 2 x `mean_response` - 1, which must not be above the budget.
    """
    rows = -(-workload.batch // workload.layout.rows)
    length_B = _lengths(rows, workload.response, mean_response)
    stages = []
    if workload.rollouts:
        stages = [rollout(workload, device, length_B)] * workload.samples
        if workload.written:
            stages.insert(0, _writing(workload.writing, device, mean_response))
        stages.append(_turns(workload.taught, device, length_B))
    if workload.golden_divergence:
        golden = [one.of_golden for one in workload.taught]
        scored = _turns(golden, device, _golden(workload, length_B))
        stages.append(dataclasses.replace(scored, name="score golden"))
    stages.append(update(workload, device, length_B))
    tokens = (
        float(length_B.sum()) * min(workload.layout.rows, workload.batch)
        if workload.rollouts
        else 0.0
    )
    return StepTime(tuple(stages), tokens, workload.steps)


def rollout(workload: Workload, device: Device, length_B: np.ndarray) -> StageTime:
    """Prompts, then a token at a time in refilled slots: weights once a step, live positions once."""
    model, tensor = workload.student, workload.layout.tensor
    steps = _makespan(length_B, workload.device_slots)
    read = _read(model, tensor)
    positions = float((length_B * workload.prompt + length_B * (length_B - 1) / 2).sum())
    tokens = float(length_B.sum())
    cached = account.cache_bytes_per_token(model, workload.itemsize)
    prompts = account.prefill(
        model, np.full(len(length_B), workload.prompt), itemsize=workload.itemsize
    )[0]
    flops = 2.0 * read * tokens
    flops += (prompts.flops + account.attention_flops(model, positions)) / tensor
    moved = steps * workload.itemsize * read
    moved += (prompts.bytes + cached * (positions + tokens)) / tensor
    kernels = xla.KERNELS_DECODE.count * model.num_layers * device.kernel_s * steps
    collectives = 2 * model.num_layers * steps if tensor > 1 else 0
    sent = collectives * workload.device_slots * model.hidden_size * workload.itemsize
    return StageTime(
        "rollout",
        flops / device.flops_per_s,
        moved / device.bytes_per_s,
        kernels,
        _reduced(sent, tensor, device) + collectives * _COLLECTIVE_S
        + _gathers(workload, "student", model, 1, workload.itemsize, device),
    )  # fmt: skip


def _writing(workload: Workload, device: Device, mean_response: float | None) -> StageTime:
    """What the student writes for the teacher: at its budget, or spread evenly around half of it."""
    rows = -(-workload.batch // workload.layout.rows)
    mean = None if mean_response is None else (workload.response + 1) / 2
    found = rollout(workload, device, _lengths(rows, workload.response, mean))
    return dataclasses.replace(found, name="rollout harness")


def _turns(taught: Sequence[Workload], device: Device, length_B: np.ndarray) -> StageTime:
    """The turns of several teachers: each on an even share of the rows, or on all of them."""
    count = len(taught)
    rows = [length_B[i::count] if one.turns.routed else length_B for i, one in enumerate(taught)]
    turns = [score(one, device, x) for one, x in zip(taught, rows, strict=True) if len(x)]
    causes = ("compute_s", "memory_s", "latency_s", "communication_s")
    total = {name: sum(getattr(turn, name) for turn in turns) for name in causes}
    return dataclasses.replace(turns[0], **total)


def score(workload: Workload, device: Device, length_B: np.ndarray) -> StageTime:
    """A pass of the student and one of the teacher over whole rows, with the logits of the responses."""
    works = [_pass(workload.student, workload, length_B, workload.itemsize)]
    gathered = _gathers(
        workload, "student", workload.student, _parts(workload, length_B), workload.itemsize, device
    )
    if workload.teacher is not None:
        works.append(_pass(workload.teacher, workload, length_B, workload.teacher_itemsize))
        gathered += _gathers(
            workload,
            "teacher",
            workload.teacher,
            _parts(workload, length_B),
            workload.teacher_itemsize,
            device,
        )
    models = [workload.student] + [workload.teacher] * (workload.teacher is not None)
    if workload.reference_scores and workload.reference is not None:
        other, parts = workload.reference, _parts(workload, length_B)
        works.append(_pass(other, workload, length_B, workload.reference_itemsize))
        gathered += _gathers(
            workload, "reference", other, parts, workload.reference_itemsize, device
        )
        models.append(other)
    sent = sum(_layer_traffic(workload, model, length_B, 2) for model in models if model)
    return _stage("score", works, device, _reduced(sent, workload.layout.tensor, device) + gathered)


def update(workload: Workload, device: Device, length_B: np.ndarray) -> StageTime:
    """Forward, backward with what is computed again, models beside; then one reduction and AdamW."""
    model = workload.student
    works, sent, gathered = [], 0.0, 0.0
    kinds = [length_B] * workload.rollouts
    if workload.golden:
        kinds.append(_golden(workload, length_B))
    for lengths in kinds:
        works.append(_learning(workload, lengths))
        again = 2 if workload.remat in ("attention", "full") else 0
        sent += _layer_traffic(workload, model, lengths, 4 + again)
        passes = 2 * _parts(workload, lengths)
        gathered += _gathers(workload, "student", model, passes, workload.itemsize, device)
        if workload.layout.student == "sharded":  # gradients of each micro-batch, float32
            gathered += _gathers(workload, "student", model, passes / 2, 4, device)
    read = [length_B] * (workload.rollouts and workload.over_vocabulary)
    read += [_golden(workload, length_B)] * workload.golden_over_vocabulary
    for lengths in read:  # the teacher's logits again
        assert workload.teacher is not None
        matrix = 1.0 * account.head_parameters(workload.teacher)
        works.append(
            Work(
                2 * matrix * float(lengths.sum()),
                workload.itemsize * matrix * _parts(workload, lengths),
            )
        )
    reads_reference = workload.rollouts and workload.reference_in_update
    if reads_reference and workload.reference is not None:
        other = workload.reference
        works.append(_pass(other, workload, length_B, workload.itemsize))
        sent += _layer_traffic(workload, other, length_B, 2)
        gathered += _gathers(
            workload, "reference", other, _parts(workload, length_B), workload.itemsize, device
        )
    parameters = resident.parameters(model, workload.layout.mesh)
    works.append(Work(0.0, workload.updates * 28.0 * parameters / workload.layout.rows))
    traffic = workload.updates * _once_a_step(workload, parameters, device)
    return _stage(
        "update", works, device,
        _reduced(sent, workload.layout.tensor, device) + gathered + traffic,
    )  # fmt: skip


def _learning(workload: Workload, length_B: np.ndarray) -> Work:
    """Forward and backward: three times the forward's products, and what `remat` computes again.

    Prompts and padding have no logits. Fused attention makes its scores again backward: 2.5 times the
    forward's.
    """
    model, whole_B = workload.student, length_B + workload.prompt
    tokens = _padded(workload, length_B)
    pairs = float((whole_B * (whole_B + 1) / 2).sum())
    again = workload.remat in ("attention", "full")
    tensor = workload.layout.tensor
    layers = account.matrix_parameters(model) / tensor
    products = 2.0 * tokens * layers * (3 + again)
    products += 2.0 * 3 * account.head_parameters(model) * float(length_B.sum())
    attention = account.attention_flops(model, pairs) * (3.5 + (workload.remat == "full")) / tensor
    passes = (3 + again) * _parts(workload, length_B)
    return Work(products + attention, passes * workload.itemsize * _read(model, tensor))


def _pass(model: ModelConfig, workload: Workload, length_B: np.ndarray, itemsize: int) -> Work:
    """Forward over whole rows, with the logits of the responses."""
    whole_B = length_B + workload.prompt
    pairs = float((whole_B * (whole_B + 1) / 2).sum())
    tensor = workload.layout.tensor
    products = account.matrix_parameters(model) / tensor * _padded(workload, length_B)
    products += account.head_parameters(model) * float(length_B.sum())
    return Work(
        2.0 * products + account.attention_flops(model, pairs) / tensor,
        itemsize * _read(model, tensor) * _parts(workload, length_B),
    )


def _read(model: ModelConfig, tensor: int) -> float:
    """Weights in matrices that a device reads in a pass: layers divided over `tensor`, logits whole."""
    return account.matrix_parameters(model) / tensor + account.head_parameters(model)


def _stage(name: str, works: list[Work], device: Device, communication_s: float) -> StageTime:
    """Pieces of work one after another."""
    flops = sum(work.flops for work in works)
    moved = sum(work.bytes for work in works)
    return StageTime(
        name, flops / device.flops_per_s, moved / device.bytes_per_s, 0.0, communication_s
    )


def _once_a_step(workload: Workload, parameters: float, device: Device) -> float:
    """Gradients summed and divided (float32), new compute weights handed round; seconds.

    Replicated weights: over data x fsdp. Sharded ones: over data, of each fsdp part.
    """
    layout = workload.layout
    if layout.student == "sharded":
        group, share = layout.data, parameters / layout.fsdp
    else:
        group, share = layout.rows, parameters
    bytes_ = share * (4 + workload.itemsize) * (group - 1) / group
    return bytes_ / rate(group * layout.tensor, device) + 2 * _COLLECTIVE_S * (group > 1)


def _gathers(
    workload: Workload, role: str, model: ModelConfig, times: float, itemsize: int, device: Device
) -> float:
    """Seconds of gathering a role's sharded weights so many times; 0 where they are replicated."""
    layout = workload.layout
    if getattr(layout, role) != "sharded" or layout.fsdp == 1:
        return 0.0
    bytes_ = resident.parameters(model, layout.mesh) * itemsize
    seconds = bytes_ * (layout.fsdp - 1) / layout.fsdp / rate(layout.fsdp * layout.tensor, device)
    return times * (seconds + model.num_layers * _COLLECTIVE_S)


def _layer_traffic(
    workload: Workload, model: ModelConfig, length_B: np.ndarray, times: int
) -> float:
    """Bytes that `times` reductions a layer over `tensor` sum: the residual stream of every token."""
    if workload.layout.tensor == 1:
        return 0.0
    return (
        times
        * model.num_layers
        * _padded(workload, length_B)
        * model.hidden_size
        * workload.itemsize
    )


def _reduced(bytes_: float, group: int, device: Device) -> float:
    """Seconds of summing so many bytes over a group, everywhere: 2 (n - 1) / n of them a link."""
    return 2 * bytes_ * (group - 1) / group / rate(group, device)


def rate(group: int, device: Device) -> float:
    """Bytes a second of a collective over so many neighbours; beyond a node all its ports work."""
    if group <= device.per_node:
        return device.link_bytes_per_s
    return min(device.link_bytes_per_s, device.network_bytes_per_s * device.per_node)


def _golden(workload: Workload, length_B: np.ndarray) -> np.ndarray:
    """A device's golden solutions, taken to be as long as the responses of `length_B`."""
    golden = -(-workload.golden * workload.updates // workload.layout.rows)
    return length_B[np.linspace(0, len(length_B) - 1, golden).astype(int)]


def _lengths(rows: int, budget: int, mean: float | None) -> np.ndarray:
    if mean is None:
        return np.full(rows, budget, np.int64)
    longest = min(2 * mean - 1, budget)
    return np.ceil(longest * (np.arange(rows) + 1) / rows).astype(np.int64)


def _makespan(length_B: np.ndarray, slots: int) -> int:
    """Decode steps until all are done: at least the longest, and at least what the slots can hold."""
    return max(int(length_B.max()), math.ceil(length_B.sum() / min(slots, len(length_B))))


def _padded(workload: Workload, length_B: np.ndarray) -> float:
    """Return the tokens of the rows as the models see them, at the widths of micro-batches."""
    whole_B = length_B + workload.prompt
    return float(
        microbatches.padded_lengths(
            whole_B, workload.width, workload.tile, replicas=workload.layout.rows
        ).sum()
    )


def _parts(workload: Workload, length_B: np.ndarray) -> int:
    """Return how many micro-batches there are at least: as if each were full."""
    return max(math.ceil(_padded(workload, length_B) / workload.microbatch_tokens), 1)
