"""A plan as text and JSON: lines for the start of a run, a table, plan.json."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax.hardware import GIB
from opd_jax.memory_plan import footprint, memory
from opd_jax.memory_plan.memory import KINDS, Memory
from opd_jax.memory_plan.step_time import EFFICIENCY, StepTime, step_time
from opd_jax.memory_plan.workload import Workload

MIB = 2**20
_LEAST = 0.002  # of a stage: what is less is not mentioned in a line


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """Memory, and the time of a step: every response at its budget, and lengths spread evenly."""

    memory: Memory
    longest: StepTime
    spread: StepTime


def make(planned: Memory) -> RunPlan:
    """Return the plan with the time of a step."""
    workload, device = planned.workload, planned.device
    half = step_time(workload, device, mean_response=(workload.response + 1) / 2)
    return RunPlan(planned, step_time(workload, device), half)


def lines(plan: RunPlan) -> list[str]:
    """Return a few lines: devices, memory of each stage, the largest sizes that fit, the time of a step."""
    planned = plan.memory
    device, layout = planned.device, planned.workload.layout
    where = f"{layout.devices} x {device.kind}"
    if layout.devices > 1:
        where += f" (data {layout.data} x fsdp {layout.fsdp} x tensor {layout.tensor})"
    out = [f"plan: {where}, {planned.usable / GIB:.1f} GiB for arrays on each"]
    out += [
        f"  {stage.name:<16}{amount(stage.total):>10}  {_parts(stage)}" for stage in planned.stages
    ]
    state = f"fits, {amount(planned.headroom)} to spare"
    margin = f"the margin of {amount(planned.margin)} ({memory.MARGIN:.0%}) for holes in the pool"
    if planned.margin and planned.keeps_margin:
        state += f", more than {margin}"
    elif planned.margin and planned.fits:
        state += (
            f", less than {margin}: set --config.mesh.allocator=vmm, which has none, or "
            f"{memory.remedy(planned)}"
        )
    if not planned.fits:
        state = f"does not fit: {amount(-planned.headroom)} too much; {memory.remedy(planned)}"
    out.append(f"  {state}; largest that fit: {_largest(planned)}")
    if device.gpu:
        out += [f"  {text}" for text in _times(plan)]
    else:
        passes = amount(memory.host_bytes(planned.workload)["checkpoint"])
        out += [f"  a checkpoint passes {passes} through the host"]
    return out


def amount(size: float) -> str:
    """Return bytes as GiB or MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def table(plan: RunPlan) -> str:
    """Stages by kinds, in GiB (of small models MiB), for a terminal."""
    planned = plan.memory
    unit = GIB if planned.peak.total >= GIB else MIB
    kinds = [kind for kind in KINDS if any(stage.held.get(kind) for stage in planned.stages)]
    width = max(len(kind) for kind in kinds)
    head = ("GiB" if unit == GIB else "MiB").ljust(width) + "".join(
        f"{stage.name:>17}" for stage in planned.stages
    )
    rows = [head]
    for kind in kinds:
        sizes = (stage.held.get(kind, 0.0) / unit for stage in planned.stages)
        rows.append(f"{kind:<{width}}" + "".join(f"{_size(size):>17}" for size in sizes))
    for name, values in (
        ("in all", [stage.total for stage in planned.stages]),
        ("headroom", [planned.usable - stage.total for stage in planned.stages]),
    ):
        rows.append(f"{name:<{width}}" + "".join(f"{_size(v / unit):>17}" for v in values))
    return "\n".join(rows)


def to_json(plan: RunPlan) -> dict[str, Any]:
    """Return everything that plan.json has: bytes and seconds."""
    planned = plan.memory
    workload, device = planned.workload, planned.device
    return {
        "device": {"kind": device.kind, "memory_gib": device.memory_gib, "source": device.source},
        "layout": dataclasses.asdict(workload.layout),
        "usable_bytes": planned.usable,
        "fits": planned.fits,
        "headroom_bytes": planned.headroom,
        "margin_bytes": planned.margin,
        "busiest": planned.peak.name,
        "largest": dict(planned.largest),
        "remedy": None if planned.fits else memory.remedy(planned),
        "stages": {stage.name: dict(stage.held) for stage in planned.stages},
        "host_bytes": memory.host_bytes(workload),
        "microbatch": {"rollout_rows": workload.rollout_rows, "golden_rows": workload.golden_rows,
                       "width": workload.width},
        "step": {"longest": _step(plan.longest), "spread": _step(plan.spread)}
        if device.gpu
        else None,
        "efficiency": EFFICIENCY,
    }  # fmt: skip


def programs(workload: Workload) -> dict[str, footprint.Footprint]:
    """Return planned bytes of the widest program of each kind, by the beginning of its name."""
    found = {"optimizer": footprint.optimizer(workload)}
    if workload.layout.devices > 1:
        found["compute weights"] = footprint.compute_weights(workload)
        found["sum of gradients"] = footprint.gradient_sum(workload)
    if workload.rollouts:
        found["prefill"] = footprint.prefill(workload, workload.device_slots)
        found["decode"] = footprint.decode(workload, workload.device_slots)
        if workload.written:
            writing = workload.writing
            found["harness prefill"] = footprint.prefill(writing, writing.device_slots)
            found["harness decode"] = footprint.decode(writing, writing.device_slots)
        if workload.teacher_vocabulary:
            found["score"], found["teacher: score"] = map(footprint.score, workload.alone)
        else:
            found["score"] = _largest_score(workload.taught)
        found["gradient on rollouts"] = footprint.gradient(workload)
    if workload.golden_divergence:
        found["golden score"] = _largest_score([one.of_golden for one in workload.taught])
    if workload.golden:
        found["gradient on golden"] = footprint.gradient(workload, golden=True)
    return found


def _largest_score(taught: Sequence[Workload]) -> footprint.Footprint:
    return max(map(footprint.score, taught), key=lambda one: one.temporary_bytes)


def _parts(stage: memory.Stage) -> str:
    """The stage's kinds, largest first, without the crumbs."""
    kinds = sorted(stage.held, key=lambda kind: -stage.held[kind])
    unit = GIB if stage.total >= GIB else MIB
    return ", ".join(
        f"{kind} {stage.held[kind] / unit:.1f}"
        for kind in kinds
        if stage.held[kind] >= _LEAST * stage.total
    )


def _largest(planned: Memory) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in planned.largest.items() if value)


def _times(plan: RunPlan) -> Iterator[str]:
    for step, what in (
        (plan.longest, "every response at its budget"),
        (plan.spread, "lengths spread evenly up to it"),
    ):
        stages = ", ".join(
            f"{stage.name} {stage.expected_s:.0f} ({stage.bound})" for stage in step.stages
        )
        speed = f"; {step.tokens_per_s:,.0f} tokens/s" if step.tokens else ""
        yield (
            f"a step, {what}: lower bound {step.lower_bound_s:.0f} s, estimate {step.expected_s:.0f} s: "
            f"{stages}{speed}; {step.steps} steps are {step.days:.1f} days"
        )
    assumed = ", ".join(f"{name} {share:g}" for name, share in EFFICIENCY.items())
    yield f"estimates assume these shares of the device's rates, which are not measured: {assumed}"


def _step(step: StepTime) -> dict[str, Any]:
    return {
        "expected_s": step.expected_s, "floor_s": step.lower_bound_s, "tokens": step.tokens,
        "tokens_per_s": step.tokens_per_s, "steps": step.steps, "days": step.days,
        "stages": {
            stage.name: dataclasses.asdict(stage)
            | {
                "expected_s": stage.expected_s,
                "floor_s": stage.lower_bound_s,
                "bound": stage.bound,
            }
            for stage in step.stages
        },
    }  # fmt: skip


def _size(gib: float) -> str:
    return "-" if gib == 0 else f"{gib:.2f}"
