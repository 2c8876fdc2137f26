"""Memory of each stage of a step on one device, what fits, and what to change where it does not."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_jax.errors import PlanError
from opd_jax.hardware import GIB, Device, memory_fraction, whole_host_bytes
from opd_jax.memory_plan import footprint, resident
from opd_jax.memory_plan.footprint import Footprint
from opd_jax.memory_plan.layout import Layout
from opd_jax.memory_plan.workload import Workload
from opd_jax.scoring.score import IN_FLIGHT
from opd_jax.sharding import partition
from opd_jax.sharding.mesh import ONE
from opd_jax.types import Scores

# Share of a GPU's memory that a plan leaves free: the allocator's pool gets holes, and an array needs one
# piece (jax-ml/jax issues 9064 and 25082). Other allocators (mesh.allocator) move pages instead.
MARGIN = 0.05
# Stages by what makes them smaller; all others have micro-batches.
_ROLLING, _ANSWERING = ("rollout harness", "rollout"), ("evaluate", "evaluate teacher")
KINDS = ("student", "unstacked", "master", "optimizer", "average", "gradients", "teacher",
         "reference", "caches", "rows", "activations", "working", "logits", "weight copies")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes that one device holds at the busiest moment of a stage, by kind (`KINDS`)."""

    name: str
    held: Mapping[str, float]

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.held.values())


def stages(workload: Workload) -> list[Stage]:
    """Return the stages that the run has, in their order."""
    base = always(workload)
    own = {"student": resident.weight_bytes(workload, "student")} if workload.own_copy else {}
    live = dict(own)
    if workload.teacher is not None and workload.teacher_follows == "average" and workload.own_copy:
        live["teacher"] = resident.weight_bytes(workload, "teacher")
    gradients = {"gradients": resident.gradients(workload)}
    trained = own if workload.layout.devices > 1 else {}
    found = []
    if workload.rollouts:
        if workload.written:
            writing = workload.writing
            decoding = _decoding(writing, writing.device_slots)
            found.append(Stage("rollout harness", _sum(base, live, decoding)))
        decoding = _decoding(workload, workload.device_slots)
        if workload.samples:
            found.append(Stage("rollout", _sum(base, live, decoding)))
        found.append(Stage("score", _sum(base, live, _turn(workload.taught))))
    if workload.golden_divergence:
        golden = tuple(one.of_golden for one in workload.taught)
        found.append(Stage("score golden", _sum(base, live, _turn(golden))))
    kinds = [False] * workload.rollouts + [True] * (workload.golden > 0)
    learning = [footprint.gradient(workload, golden=golden) for golden in kinds]
    busiest = max(learning, key=lambda one: one.temporary_bytes)
    beside = {}
    whole = workload.over_vocabulary or workload.golden_over_vocabulary
    if whole and workload.teacher_follows != "frozen":
        beside["teacher"] = resident.teacher_head(workload)  # a copy: the state's own is donated
    given = {"rows": busiest.arguments["rows"]}
    update = _sum(base, trained, gradients, beside, given, busiest.temporaries)
    found.append(Stage("update", update))
    if workload.term_gradients:  # with those of the other terms in memory
        finished = {"gradients": (len(workload.terms) - 1) * _finished(workload)}
        found.append(Stage("term gradients", _sum(update, finished)))
    summed = {"gradients": resident.gradients(workload)}
    if workload.layout.devices > 1:  # summed over the devices, and the new compute weights
        summed["gradients"] += resident.masters(workload)
    found.append(
        Stage("optimizer", _sum(base, trained, summed, footprint.optimizer(workload).temporaries))
    )
    if workload.evaluated:
        answering = _decoding(
            dataclasses.replace(workload, response=workload.answer), workload.device_answers
        )
        found.append(Stage("evaluate", _sum(base, own, answering)))
        if workload.teacher is not None and workload.asks_teacher:  # it reads its own prompts
            alone = dataclasses.replace(
                workload, student=workload.teacher, itemsize=workload.teacher_itemsize,
                response=workload.answer,
                prompt=(workload.teacher_width or workload.width)
                - (workload.teacher_response or workload.response),
            )  # fmt: skip
            answering = _decoding(alone, workload.device_answers)
            live = own if workload.teacher_follows == "live" else {}
            if workload.teacher_follows == "average" and workload.own_copy:
                live = {"teacher": resident.weight_bytes(workload, "teacher")}
            if workload.turns.wait:
                live = {"teacher": resident.weight_bytes(workload, "teacher")}
            found.append(Stage("evaluate teacher", _sum(base, live, answering)))
    found.append(Stage("checkpoint", base))
    return found


def always(workload: Workload) -> dict[str, float]:
    """Return the bytes that stay on a device from the first step to the last."""
    state = resident.state(workload)
    held = {
        "master": resident.bytes_on_device(state.params),
        "optimizer": resident.bytes_on_device(state.opt_state),
    }
    if state.average is not None:
        held["average"] = resident.bytes_on_device(state.average)
    if not workload.turns.wait and (teachers := _teacher_bytes(workload)):
        held["teacher"] = teachers
    if workload.reference is not None and not workload.same_reference:
        held["reference"] = resident.weight_bytes(workload, "reference")
    return held


def host_bytes(workload: Workload) -> dict[str, float]:
    """Return bytes of the host's memory.

    A device's share of a checkpoint, an export of the student, and with jumps the snapshot of the last one
    and the weights that wait while a candidate is tried; a checkpoint then has the snapshot too. Teachers
    that wait between their turns.
    """
    copies = 4 if workload.teacher_follows == "average" else 3
    whole = 4.0 * resident.parameters(workload.student, ONE)
    found = {"checkpoint": copies * resident.masters(workload), "export": whole}
    found |= {"jump": 2 * whole} if workload.jumps else {}
    return found | ({"teachers": _teacher_bytes(workload)} if workload.turns.wait else {})


@dataclasses.dataclass(frozen=True)
class Memory:
    """The plan: stages against what a device has for arrays, and the largest sizes that fit.

    `largest` has, by field, the largest value with which every stage fits and leaves `margin` bytes free, the
    others as they are. A run that fits without the margin is not refused, but told.
    """

    workload: Workload
    device: Device
    usable: float
    stages: tuple[Stage, ...]
    largest: Mapping[str, int]
    margin: float = 0.0

    @property
    def peak(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def headroom(self) -> float:
        """Bytes that are left over at the busiest moment; below 0 where it does not fit."""
        return self.usable - self.peak.total

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.headroom >= 0

    @property
    def keeps_margin(self) -> bool:
        """Whether every stage fits and leaves the margin free."""
        return self.headroom >= self.margin


def plan(workload: Workload, device: Device, *, usable: float | None = None) -> Memory:
    """Return the memory plan. `usable`: bytes that a device has for arrays, where that is known."""
    if usable is None:
        usable = usable_bytes(device, workload.layout)
    margin = MARGIN * usable if device.gpu else 0.0
    largest = {
        "optim.microbatch_tokens": largest_microbatch(workload, usable - margin),
        "rollout.slots": largest_slots(workload, usable - margin) if workload.samples else 0,
    }
    return Memory(workload, device, usable, tuple(stages(workload)), largest, margin)


def usable_bytes(device: Device, layout: Layout) -> float:
    """Return the bytes that one device has for arrays. Devices of a CPU share its free memory."""
    if device.gpu:
        return device.memory_gib * GIB * memory_fraction()
    return device.memory_gib * GIB / layout.devices


def largest_microbatch(workload: Workload, usable: float) -> int:
    """Return the largest `optim.microbatch_tokens` with which scoring and update fit; 0 if no row fits."""
    widest = max(workload.width, workload.teacher_width)
    golden = workload.golden * (workload.updates if workload.golden_divergence else 1)
    most = max(workload.device_batch * workload.rollouts, -(-golden // workload.layout.rows), 1)

    def fits(rows: int) -> bool:
        sized = dataclasses.replace(workload, microbatch_tokens=rows * widest)
        return _peak(sized, but=(*_ROLLING, *_ANSWERING)) <= usable

    return widest * _largest(fits, most)


def largest_slots(workload: Workload, usable: float) -> int:
    """Return the largest `rollout.slots`, up to all rollouts of a step; 0 if not one a device fits."""
    rows = workload.layout.rows

    def fits(slots: int) -> bool:
        sized = dataclasses.replace(workload, slots=min(slots * rows, workload.batch))
        return _peak(sized, only=_ROLLING) <= usable

    return min(_largest(fits, -(-workload.batch // rows)) * rows, workload.batch)


def largest_answers(workload: Workload, usable: float) -> int:
    """Return the largest `eval.slots`, up to that of the workload; 0 if not one a device fits."""
    rows = workload.layout.rows

    def fits(answers: int) -> bool:
        sized = dataclasses.replace(workload, evaluated=min(answers * rows, workload.evaluated))
        return _peak(sized, only=_ANSWERING) <= usable

    return min(_largest(fits, -(-workload.evaluated // rows)) * rows, workload.evaluated)


def require_fit(memory: Memory) -> None:
    """Raise PlanError if the workload does not fit: names the largest kind and the fields to change.

    On a CPU it is refused only if the whole machine has too little memory, for free memory changes.
    """
    limit = memory.usable
    if not memory.device.gpu:
        limit = max(limit, whole_host_bytes() / memory.workload.layout.devices)
    if memory.peak.total <= limit:
        return
    stage, name = memory.peak, memory.device.kind
    most = max(stage.held, key=lambda kind: stage.held[kind])
    raise PlanError(
        f"{stage.name} needs {stage.total / GIB:.1f} GiB of a device, most of it {most} "
        f"({stage.held[most] / GIB:.1f}), wanted at most {limit / GIB:.1f} ({name}); {remedy(memory)}"
    )


def remedy(memory: Memory) -> str:
    """Return the smallest change found that makes the workload fit with its margin, as flags."""
    usable = memory.usable - memory.margin
    for fields, changed in _changes(memory.workload):
        small = dataclasses.replace(
            changed, slots=min(changed.layout.rows, changed.batch),
            microbatch_tokens=max(changed.width, changed.teacher_width),
            evaluated=min(changed.layout.rows, changed.evaluated),
        )  # fmt: skip
        if _peak(small) > usable:
            continue
        fields, workload = dict(fields), changed
        tokens = largest_microbatch(workload, usable)
        if tokens < workload.microbatch_tokens:
            fields["optim.microbatch_tokens"] = tokens
            workload = dataclasses.replace(workload, microbatch_tokens=tokens)
        slots = largest_slots(workload, usable)
        if slots < workload.slots:
            fields["rollout.slots"] = slots
        answers = largest_answers(workload, usable)
        if answers < workload.evaluated:
            fields["eval.slots"] = answers
        if not fields:
            return "nothing has to change"
        return "set " + " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return "take more devices, devices with more memory, or smaller models"


def _changes(workload: Workload) -> list[tuple[dict[str, Any], Workload]]:
    """Return changes to try, each with the fields that make it, the cheapest first."""
    found: list[tuple[dict[str, Any], Workload]] = [({}, workload)]

    def also(fields: dict[str, Any], **changes: Any) -> None:
        before, changed = found[-1]
        found.append((before | fields, dataclasses.replace(changed, **changes)))

    if workload.term_gradients:
        also({"log.gradients": 0}, term_gradients=False)
    if workload.remat in ("none", "dots"):
        also({"optim.remat": "attention"}, remat="attention")
    if max(workload.token_chunk, workload.score_chunk) > 512:
        also(
            {"optim.token_chunk": 512, "scoring.token_chunk": 512}, token_chunk=512, score_chunk=512
        )
    also({"optim.remat": "full"}, remat="full")
    count = workload.layout.devices
    if count == 1:
        return found
    roles = [role for role in ("teacher", "reference", "student") if getattr(workload, role)]
    axes = {"mesh.data": 1, "mesh.fsdp": count, "mesh.tensor": 1}
    for some in range(1, len(roles) + 1):
        over: dict[str, Any] = dict.fromkeys(roles[:some], "sharded")
        inner = dataclasses.replace(Layout(fsdp=count), **over)
        also(axes | {f"mesh.{role}": "sharded" for role in over}, layout=inner)
    whole = {f"mesh.{role}": "replicated" for role in roles}
    for tensor in (2, 4, 8):
        if count % tensor == 0 and all(
            partition.divides(getattr(workload, r), tensor) for r in roles
        ):
            inner = Layout(data=count // tensor, tensor=tensor)
            also(
                axes | whole | {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": tensor},
                layout=inner,
            )
    return found


def _teacher_bytes(workload: Workload) -> float:
    """Return the bytes of all teachers with weights of their own, if they are frozen."""
    if workload.teacher is None or workload.teacher_follows != "frozen":
        return 0.0
    others = (dataclasses.replace(workload, teacher=other) for other in workload.turns.held)
    return resident.teacher_bytes(workload) + sum(
        resident.weight_bytes(other, "teacher") for other in others
    )


def _turn(taught: Sequence[Workload]) -> dict[str, float]:
    """Return the busiest of the turns in which teachers score; one that waited is on the device then."""
    turns = []
    for one in taught:
        waited = {"teacher": resident.weight_bytes(one, "teacher")} if one.turns.wait else {}
        turns.append(_sum(waited, _scoring(one)))
    return max(turns, key=lambda turn: sum(turn.values()))


def _scoring(workload: Workload) -> dict[str, float]:
    """Scores of the micro-batches in flight, and what scoring one of them takes."""
    # An id, and scores. Of a recording the support stays on the host until the update.
    kept = 1 + footprint.arrays_per_token(Scores)
    kept += 3 * workload.support * (not workload.replayed)
    kept -= not workload.reference_scores  # reference_logprob_BT
    rows = min(IN_FLIGHT * workload.score_rows, workload.device_batch)
    scored = {"rows": 4.0 * kept * rows * workload.width}
    if workload.over_vocabulary:
        reads = workload.alone[1] if workload.span_events else workload
        scored["rows"] += footprint.hidden_for_update(reads, rows)
    return _sum(scored, footprint.score(workload).temporaries)


def _decoding(workload: Workload, slots: int) -> dict[str, float]:
    programs = (footprint.decode(workload, slots), footprint.prefill(workload, slots))
    busiest: Footprint = max(programs, key=lambda one: one.temporary_bytes)
    return _sum(programs[0].arguments, busiest.temporaries)


def _finished(workload: Workload) -> float:
    """A gradient that is whole: divided like the state where there are several devices."""
    return resident.masters(workload)


def _peak(workload: Workload, *, only: Sequence[str] = (), but: Sequence[str] = ()) -> float:
    """The largest stage of all, of those named, or of the others; what is always held is one of each."""
    return max(
        stage.total
        for stage in stages(workload)
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
