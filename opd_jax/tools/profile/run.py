"""Profile a run: trace some steps, and compare their times with the measured limits of the machine."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import monitoring
from ml_collections import ConfigDict

from opd_jax import hardware, train
from opd_jax.memory_plan.workload import Workload, of_setup
from opd_jax.metrics.tracing import FOLDER, MEMORY
from opd_jax.models import flops
from opd_jax.models.flops import Work
from opd_jax.tools.bench import ceilings
from opd_jax.tools.bench.ceilings import Ceilings
from opd_jax.tools.profile import trace
from opd_jax.tools.profile.trace import Trace
from opd_jax.training.make_setup import make_setup
from opd_jax.workdir.console import aligned

HLO = "hlo"  # folder of the compiled programs' texts, in the folder of the trace
_COMPILED = "/jax/core/compile/backend_compile_duration"
_TOP = 12  # rows of the tables of operations and programs
_COPY_GIB = {"gpu": 4.0, "cpu": 0.25}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Results of a profile.

    Attributes:
      trace: the traced steps.
      works: minimum operations and bytes of each stage, summed over the steps.
      ceilings: measured limits of the machine.
      compiled: compilation time of each program in seconds.
      scopes: program -> operation -> named scope.
      memory: (seconds, bytes) over time.
    """

    trace: Trace
    works: Mapping[str, Work]
    ceilings: Ceilings
    compiled: Mapping[str, float]
    scopes: Mapping[str, Mapping[str, str]]
    memory: Sequence[tuple[float, float]]


def run(config: ConfigDict, workdir: str, *, steps: int, command: list[str]) -> Profile:
    """Train until `steps` steps are traced, and return their profile. The run has no evaluations."""
    config = config.copy_and_resolve_references()
    config.profile.steps = steps
    config.steps = config.profile.start_step + steps - 1
    config.eval.data, config.eval.best, config.data.epochs, config.checkpoint.every = "", "", 0.0, 0
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    config.log.every, config.log.rollouts = 1, rows  # `works` needs the lengths of all rollouts
    compiled = _listen()
    train.run(config, workdir, command=command)
    folder = pathlib.Path(workdir)
    setup = make_setup(config)
    first = jax.devices()[0]
    device = hardware.of_jax(first.device_kind, first.platform) or hardware.find("cpu")
    count = 1 if setup.mesh.devices is None else setup.mesh.devices.size
    job = of_setup(setup, device, count)
    return Profile(
        trace=trace.read(trace.newest(folder / FOLDER)),
        works=works(job, lengths(folder / "rollouts.jsonl", config.profile.start_step)),
        ceilings=_ceilings(job, count if device.gpu else 1),  # devices of one CPU share its cores
        compiled=dict(compiled),
        scopes=scopes(folder / FOLDER / HLO),
        memory=timeline(folder / FOLDER / MEMORY),
    )


def lengths(file: pathlib.Path, first: int) -> dict[int, list[tuple[int, int]]]:
    """Return (prompt, response) lengths in tokens of every rollout from step `first` on, by step."""
    out: dict[int, list[tuple[int, int]]] = {}
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line and (row := json.loads(line))["step"] >= first:
            pair = len(row["prompt_ids"]), len(row["response_ids"])
            out.setdefault(row["step"], []).append(pair)
    return out


def works(job: Workload, steps: Mapping[int, Sequence[tuple[int, int]]]) -> dict[str, Work]:
    """Return the operations and bytes of each stage over the steps, without recomputation and padding.

    Golden solutions are not counted either, because a run does not log their lengths.
    """
    stages: dict[str, list[Work]] = {"rollout": [], "score": [], "update": []}
    for pairs in steps.values():
        prompt_B, response_B = (list(column) for column in zip(*pairs, strict=True))
        length_B = [p + r for p, r in pairs]
        size = job.itemsize
        stages["rollout"] += flops.prefill(job.student, prompt_B, itemsize=size)
        stages["rollout"] += flops.decode(job.student, prompt_B, response_B, itemsize=size)
        for model in (job.student, job.teacher):
            if model is not None:
                stages["score"].append(flops.forward(model, length_B, itemsize=size))
        stages["update"] += flops.update(job.student, length_B, itemsize=size)
        if job.reference is not None:
            stages["update"].append(flops.forward(job.reference, length_B, itemsize=size))
        if job.over_vocabulary and job.teacher is not None:
            weights = flops.head_parameters(job.teacher)
            stages["update"].append(Work(2.0 * weights * sum(length_B), 1.0 * size * weights))
    return {
        stage: Work(sum(work.flops for work in parts), sum(work.bytes for work in parts))
        for stage, parts in stages.items()
        if parts
    }


def scopes(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Return program -> operation -> scope, for each program whose compiled text XLA wrote to the folder."""
    out: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*after_optimizations.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        name = text.removeprefix("HloModule ").split(",")[0].split()[0]
        out.setdefault(name, {}).update(trace.scopes_of(text))
    return out


def timeline(file: pathlib.Path) -> list[tuple[float, float]]:
    """Return the memory timeline of a trace, empty where none was written."""
    if not file.is_file():
        return []
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [(row["s"], row["bytes"]) for row in rows]


def report(profile: Profile) -> str:
    """Format all tables as text."""
    return "\n\n".join([
        stage_table(profile.trace, profile.works, profile.ceilings),
        scope_table(profile.trace, profile.scopes),
        operation_table(profile.trace, profile.scopes),
        compile_table(profile.compiled),
        _memory_line(profile.memory),
    ])  # fmt: skip


def stage_table(traced: Trace, works: Mapping[str, Work], limits: Ceilings) -> str:
    """Return a table of the seconds per step of each stage, and the fraction of the machine's limits.

    MFU: minimum operations / seconds / rate of the best matrix product.
    """
    rows = [["stage", "s/step", "share", "device s", "GFLOP", "MFU", "GB", "bandwidth"]]
    busy, count = trace.by_stage(traced.operations), max(traced.count, 1)
    for name, seconds in [*traced.stages.items(), ("rest", traced.rest)]:
        work = works.get(name)
        rows.append([
            name, f"{seconds / count:.3f}", f"{seconds / traced.steps:.1%}",
            f"{busy[name] / count:.3f}" if name in busy else "-",
            *(_of_ceiling(work.flops / count, seconds / count, limits.flops_per_s) if work else ("-", "-")),
            *(_of_ceiling(work.bytes / count, seconds / count, limits.bytes_per_s) if work else ("-", "-")),
        ])  # fmt: skip
    rows.append(["step", f"{traced.steps / count:.3f}", "100.0%", *["-"] * 5])
    title = (
        f"{traced.count} steps; ceilings measured: {limits.flops_per_s / 1e12:.3f} TFLOP/s, "
        f"{limits.bytes_per_s / 1e9:.1f} GB/s"
    )
    return "\n".join([title, *aligned(rows, left=(0, 1))])


def scope_table(traced: Trace, scopes: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table of the device's seconds per step by stage and named scope."""
    total = sum(operation.seconds for operation in traced.operations) or 1.0
    rows = [["stage", "scope", "device s/step", "share"]]
    for (stage, scope), seconds in trace.by_scope(traced.operations, scopes).items():
        if seconds >= 0.005 * total:
            rows.append([stage, scope, f"{seconds / traced.count:.4f}", f"{seconds / total:.1%}"])
    return "\n".join(aligned(rows, left=(0, 1)))


def operation_table(traced: Trace, scopes: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table of the operations that took the most time."""
    rows = [["program", "operation", "scope", "count", "s/step"]]
    for operation in traced.operations[:_TOP]:
        scope = trace.scope_of(operation, scopes)
        count, seconds = operation.count // traced.count, operation.seconds / traced.count
        rows.append([operation.program, operation.name[:40], scope, str(count), f"{seconds:.4f}"])
    return "\n".join(aligned(rows, left=(0, 1)))


def compile_table(compiled: Mapping[str, float]) -> str:
    """Return a table of compilation times by program, the longest first."""
    rows = [["program", "compile s"]]
    longest = sorted(compiled.items(), key=lambda item: -item[1])
    rows += [[name, f"{seconds:.2f}"] for name, seconds in longest[:_TOP]]
    rows.append(["total", f"{sum(compiled.values()):.2f}"])
    return "\n".join(aligned(rows, left=(0, 1)))


def to_json(profile: Profile) -> dict[str, Any]:
    """Return the figures in the format of profile/summary.json."""
    return {
        "steps": profile.trace.count,
        "step_s": profile.trace.steps,
        "stages_s": dict(profile.trace.stages),
        "device_s": trace.by_stage(profile.trace.operations),
        "work": {name: dataclasses.asdict(work) for name, work in profile.works.items()},
        "ceilings": dataclasses.asdict(profile.ceilings),
        "compile_s": dict(profile.compiled),
        "scopes_s": {
            "/".join(key): seconds
            for key, seconds in trace.by_scope(profile.trace.operations, profile.scopes).items()
        },
        "memory_peak_bytes": max((size for _, size in profile.memory), default=None),
    }


def _listen() -> dict[str, float]:
    """Return a dict that collects the compilation time of each program from now on, in seconds."""
    seconds: dict[str, float] = {}

    def record(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _COMPILED:
            name = str(details.get("fun_name", "-"))
            seconds[name] = seconds.get(name, 0.0) + duration_secs

    monitoring.register_event_duration_secs_listener(record)
    return seconds


def _ceilings(job: Workload, count: int) -> Ceilings:
    """Measure the limits of `count` devices like the first."""
    dtype = jnp.float32 if job.itemsize == 4 else jnp.bfloat16
    rows = min(job.microbatch_tokens, 8192)
    shapes = [(2048, 2048, 2048), *ceilings.products_of(job.student, rows)]
    copy = _COPY_GIB.get(jax.default_backend(), 1.0)
    single = ceilings.measure(shapes, dtype=dtype, copy_gib=copy, repeats=3)[0]
    return Ceilings(single.bytes_per_s * count, single.flops_per_s * count)


def _of_ceiling(amount: float, seconds: float, rate: float) -> tuple[str, str]:
    """Return `amount` in billions, and its fraction of what the machine could do in that time."""
    return f"{amount / 1e9:.1f}", f"{amount / seconds / rate:.1%}" if seconds else "-"


def _memory_line(memory: Iterable[tuple[float, float]]) -> str:
    memory = list(memory)
    if not memory:
        return "memory: no timeline"
    least, most = (pick(memory, key=lambda pair: pair[1]) for pick in (min, max))
    return (
        f"memory: {least[1] / 2**30:.2f} to {most[1] / 2**30:.2f} GiB, most at {most[0]:.1f} s; "
        f"the timeline is in {FOLDER}/{MEMORY}"
    )
