"""The plan at the start of a run, before weights are loaded: compute, print, write and enforce it."""

import pathlib

import jax

from opd_jax import hardware
from opd_jax.hardware import Device
from opd_jax.memory_plan import memory, report
from opd_jax.memory_plan.report import RunPlan
from opd_jax.memory_plan.workload import of_setup
from opd_jax.training.setup import Setup
from opd_jax.workdir import atomic


def of_run(setup: Setup) -> RunPlan | None:
    """Return the plan of a run on the devices of this process; None where their kind is not known."""
    found = jax.devices()
    device = hardware.of_jax(found[0].device_kind, found[0].platform)
    if device is None:
        return None
    used = setup.mesh.devices.size if setup.mesh.devices is not None else 1
    workload = of_setup(setup, device, used)
    return report.make(memory.plan(workload, device, usable=_pool(device)))


def say(plan: RunPlan | None) -> list[str]:
    """Return lines for the start of the run. On a CPU one line, unless memory is short: then a warning."""
    if plan is None:
        kind = jax.devices()[0].device_kind
        return [f"plan: none, for the memory of {kind!r} is not known (opd_jax/hardware.py)"]
    planned = plan.memory
    if planned.device.gpu:
        return report.lines(plan)
    peak = planned.peak
    free = report.amount(planned.usable)
    line = f"plan: {report.amount(peak.total)} in {peak.name}, {free} are free"
    if planned.fits:
        return [line]
    return [f"warning: {line}; {memory.remedy(planned)}", *report.lines(plan)[1:]]


def require_fit(plan: RunPlan | None) -> None:
    """Raise PlanError where the run does not fit."""
    if plan is not None:
        memory.require_fit(plan.memory)


def write(plan: RunPlan | None, folder: pathlib.Path) -> None:
    """Write plan.json of the workdir."""
    if plan is not None:
        atomic.write_json(folder / "plan.json", report.to_json(plan), indent=2)


def _pool(device: Device) -> float | None:
    """Return the bytes that the runtime may take of this device, where it reports them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") if device.gpu else None
