"""Memory of each stage of a step on one device, what fits, and what to change where it does not."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_jax.errors import PlanError
from opd_jax.hardware import GIB, Device, memory_fraction, whole_host_bytes
from opd_jax.memory_plan import footprint
from opd_jax.memory_plan.footprint import Footprint
from opd_jax.memory_plan.workload import Job, Layout
from opd_jax.models import flops
from opd_jax.sharding import partition

_SCORED_AHEAD = 3  # micro-batches whose scores are on the device at one time (scoring.score)
# Stages by what makes them smaller; all others have micro-batches.
_ROLLING, _ANSWERING = ("rollout",), ("evaluate", "evaluate teacher")
KINDS = ("student", "unstacked", "master", "optimizer", "average", "gradients", "teacher",
         "reference", "caches", "rows", "activations", "working", "logits", "weight copies")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one device holds at the busiest moment of a stage: bytes by kind (`KINDS`)."""

    name: str
    held: Mapping[str, float]

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.held.values())


def stages(job: Job) -> list[Stage]:
    """The stages of a run in their order; those that the config has."""
    base = resident(job)
    own = {"student": footprint.weights(job, "student")} if job.own_copy else {}
    live = dict(own)
    if job.teacher is not None and job.teacher_follows == "average" and job.own_copy:
        live["teacher"] = footprint.weights(job, "teacher")
    gradients = {"gradients": footprint.gradients(job)}
    trained = own if job.layout.devices > 1 else {}
    found = []
    if job.rollouts:
        decoding = _decoding(job, job.device_slots)
        kept = 10 + 3 * job.support  # numbers of a token
        rows = min(_SCORED_AHEAD * job.microbatch_rows, job.device_batch * job.updates)
        scored = {"rows": 4.0 * kept * rows * job.width}
        if job.over_vocabulary:
            scored["rows"] += footprint.kept_hidden(job, rows)
        found.append(Stage("rollout", _sum(base, live, decoding)))
        found.append(Stage("score", _sum(base, live, scored, footprint.score(job).temporaries)))
    learning = [footprint.gradient(job)] * job.rollouts
    learning += [footprint.gradient(job, golden=True)] * (job.golden > 0)
    busiest = max(learning, key=lambda one: one.temporary_bytes)
    beside = {}
    if job.over_vocabulary and job.teacher_follows != "frozen":
        beside["teacher"] = footprint.head(job)  # a copy: the state's own is donated
    given = {"rows": busiest.arguments["rows"]}
    update = _sum(base, trained, gradients, beside, given, busiest.temporaries)
    found.append(Stage("update", update))
    if job.apart:  # the finished ones of the other terms lie beside
        finished = {"gradients": (len(job.terms) - 1) * _finished(job)}
        found.append(Stage("gradients apart", _sum(update, finished)))
    summed = {"gradients": footprint.gradients(job)}
    if job.layout.devices > 1:  # summed over the devices, and the new compute weights
        summed["gradients"] += footprint.master(job)
    found.append(
        Stage("optimizer", _sum(base, trained, summed, footprint.optimizer(job).temporaries))
    )
    if job.evaluated:
        rows_here = -(-job.evaluated // job.layout.rows)
        answering = _decoding(dataclasses.replace(job, response=job.answer), rows_here)
        found.append(Stage("evaluate", _sum(base, own, answering)))
        if job.teacher is not None and job.asks_teacher:  # it reads its own prompts
            alone = dataclasses.replace(
                job, student=job.teacher, itemsize=job.teacher_itemsize, response=job.answer,
                prompt=(job.teacher_width or job.width) - job.response,
            )  # fmt: skip
            answering = _decoding(alone, rows_here)
            live = own if job.teacher_follows == "live" else {}
            if job.teacher_follows == "average" and job.own_copy:
                live = {"teacher": footprint.weights(job, "teacher")}
            found.append(Stage("evaluate teacher", _sum(base, live, answering)))
    found.append(Stage("checkpoint", base))
    return found


def resident(job: Job) -> dict[str, float]:
    """What stays on a device from the first step to the last."""
    state = footprint.master(job)
    held = {"master": state, "optimizer": 2 * state}
    if job.teacher_follows == "average":
        held["average"] = state
    if job.teacher is not None and job.teacher_follows == "frozen":
        held["teacher"] = footprint.weights(job, "teacher")
        held["teacher"] += footprint.head_rows(job) if job.renumbered else 0.0
    if job.reference is not None and not job.same_reference:
        held["reference"] = footprint.weights(job, "reference")
    return held


def host_bytes(job: Job) -> dict[str, float]:
    """Memory of the host: a device's share of a checkpoint on its way, and an export of the student."""
    copies = 4 if job.teacher_follows == "average" else 3
    whole = 4.0 * flops.all_parameters(job.student)
    return {"checkpoint": copies * footprint.master(job), "export": whole}


@dataclasses.dataclass(frozen=True)
class Memory:
    """The plan: stages against what a device has for arrays, and the largest sizes that fit.

    `largest` has, by field, the largest value with which every stage fits, the others as they are.
    """

    job: Job
    device: Device
    usable: float
    stages: tuple[Stage, ...]
    largest: Mapping[str, int]

    @property
    def peak(self) -> Stage:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def headroom(self) -> float:
        """Bytes that are left over at the busiest moment; below 0 where it does not fit."""
        return self.usable - self.peak.total

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.headroom >= 0


def plan(job: Job, device: Device, *, usable: float | None = None) -> Memory:
    """The memory plan of a job; `usable` is what a device has for arrays, where that is known."""
    if usable is None:
        usable = usable_bytes(device, job.layout)
    largest = {
        "optim.microbatch_tokens": largest_microbatch(job, usable),
        "rollout.slots": largest_slots(job, usable) if job.rollouts else 0,
    }
    return Memory(job, device, usable, tuple(stages(job)), largest)


def usable_bytes(device: Device, layout: Layout) -> float:
    """What one device has for arrays: a GPU's pool; a CPU's devices share what is free."""
    if device.gpu:
        return device.memory_gib * GIB * memory_fraction()
    return device.memory_gib * GIB / layout.devices


def largest_microbatch(job: Job, usable: float) -> int:
    """The most `optim.microbatch_tokens` with which scoring and update fit; 0 where not one row does."""
    widest = max(job.width, job.teacher_width)
    most = max(job.device_batch * job.rollouts, -(-job.golden // job.layout.rows), 1)

    def fits(rows: int) -> bool:
        sized = dataclasses.replace(job, microbatch_tokens=rows * widest)
        return _peak(sized, but=(*_ROLLING, *_ANSWERING)) <= usable

    return widest * _largest(fits, most)


def largest_slots(job: Job, usable: float) -> int:
    """The most `rollout.slots`, up to all rollouts of a step; 0 where not one a device fits."""
    rows = job.layout.rows

    def fits(slots: int) -> bool:
        sized = dataclasses.replace(job, slots=min(slots * rows, job.batch))
        return _peak(sized, only=_ROLLING) <= usable

    return min(_largest(fits, -(-job.batch // rows)) * rows, job.batch)


def largest_answers(job: Job, usable: float) -> int:
    """The most `eval.slots`, up to what the job has; 0 where not one a device fits."""
    rows = job.layout.rows

    def fits(answers: int) -> bool:
        sized = dataclasses.replace(job, evaluated=min(answers * rows, job.evaluated))
        return _peak(sized, only=_ANSWERING) <= usable

    return min(_largest(fits, -(-job.evaluated // rows)) * rows, job.evaluated)


def require_fit(memory: Memory) -> None:
    """Raise PlanError where the job does not fit: what is too large, and the fields that mend it.

    A CPU's job is refused only where it is beyond the whole machine: what is free changes.
    """
    limit = memory.usable
    if not memory.device.gpu:
        limit = max(limit, whole_host_bytes() / memory.job.layout.devices)
    if memory.peak.total <= limit:
        return
    stage, name = memory.peak, memory.device.kind
    most = max(stage.held, key=lambda kind: stage.held[kind])
    raise PlanError(
        f"{stage.name} needs {stage.total / GIB:.1f} GiB of a device, most of it {most} "
        f"({stage.held[most] / GIB:.1f}), wanted at most {limit / GIB:.1f} ({name}); {remedy(memory)}"
    )


def remedy(memory: Memory) -> str:
    """The smallest change found that makes the job fit, as flags."""
    for fields, changed in _changes(memory.job):
        small = dataclasses.replace(
            changed, slots=min(changed.layout.rows, changed.batch),
            microbatch_tokens=max(changed.width, changed.teacher_width),
            evaluated=min(changed.layout.rows, changed.evaluated),
        )  # fmt: skip
        if _peak(small) > memory.usable:
            continue
        fields, job = dict(fields), changed
        tokens = largest_microbatch(job, memory.usable)
        if tokens < job.microbatch_tokens:
            fields["optim.microbatch_tokens"] = tokens
            job = dataclasses.replace(job, microbatch_tokens=tokens)
        slots = largest_slots(job, memory.usable)
        if slots < job.slots:
            fields["rollout.slots"] = slots
        answers = largest_answers(job, memory.usable)
        if answers < job.evaluated:
            fields["eval.slots"] = answers
        if not fields:
            return "nothing has to change"
        return "set " + " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return "take more devices, devices with more memory, or smaller models"


def _changes(job: Job) -> list[tuple[dict[str, Any], Job]]:
    """Changes to try, each with the fields that make it, the cheapest first."""
    found: list[tuple[dict[str, Any], Job]] = [({}, job)]

    def also(fields: dict[str, Any], **changes: Any) -> None:
        before, changed = found[-1]
        found.append((before | fields, dataclasses.replace(changed, **changes)))

    if job.apart:
        also({"log.gradients": 0}, apart=False)
    if job.remat in ("none", "dots"):
        also({"optim.remat": "attention"}, remat="attention")
    if max(job.token_chunk, job.score_chunk) > 512:
        also(
            {"optim.token_chunk": 512, "scoring.token_chunk": 512}, token_chunk=512, score_chunk=512
        )
    also({"optim.remat": "full"}, remat="full")
    count = job.layout.devices
    if count == 1:
        return found
    roles = [role for role in ("teacher", "reference", "student") if getattr(job, role)]
    axes = {"mesh.data": 1, "mesh.fsdp": count, "mesh.tensor": 1}
    for some in range(1, len(roles) + 1):
        over: dict[str, Any] = dict.fromkeys(roles[:some], "sharded")
        inner = dataclasses.replace(Layout(fsdp=count), **over)
        also(axes | {f"mesh.{role}": "sharded" for role in over}, layout=inner)
    whole = {f"mesh.{role}": "replicated" for role in roles}
    for tensor in (2, 4, 8):
        if count % tensor == 0 and all(partition.divides(getattr(job, r), tensor) for r in roles):
            inner = Layout(data=count // tensor, tensor=tensor)
            also(
                axes | whole | {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": tensor},
                layout=inner,
            )
    return found


def _decoding(job: Job, slots: int) -> dict[str, float]:
    programs = (footprint.decode(job, slots), footprint.prefill(job, slots))
    busiest: Footprint = max(programs, key=lambda one: one.temporary_bytes)
    return _sum(programs[0].arguments, busiest.temporaries)


def _finished(job: Job) -> float:
    """A gradient that is whole: divided like the state where there are several devices."""
    return footprint.master(job)


def _peak(job: Job, *, only: Sequence[str] = (), but: Sequence[str] = ()) -> float:
    """The largest stage of all, of those named, or of the others; what is always held is one of each."""
    return max(
        stage.total
        for stage in stages(job)
        if (stage.name not in but and (not only or stage.name in only))
        or stage.name == "checkpoint"
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where fewer always fit if more do; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _sum(*parts: Mapping[str, float]) -> dict[str, float]:
    out: dict[str, float] = {}
    for part in parts:
        for kind, size in part.items():
            out[kind] = out.get(kind, 0.0) + size
    return {kind: out[kind] for kind in KINDS if kind in out}
