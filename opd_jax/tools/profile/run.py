"""Profile a run: some steps traced, then where their time went, against what the machine can do."""

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
from opd_jax.training.setup import make_setup
from opd_jax.workdir.console import aligned

HLO = "hlo"  # folder of the compiled programs' texts, beside the trace
_COMPILED = "/jax/core/compile/backend_compile_duration"
_TOP = 12  # operations in the table
_COPY_GIB = {"gpu": 4.0, "cpu": 0.25}


@dataclasses.dataclass(frozen=True)
class Profile:
    """All that a profile found.

    Attributes:
      trace: the steps.
      works: of each stage, operations and bytes that it cannot do without, all steps together.
      ceilings: of the machine, measured.
      compiled: seconds of compiling, by program.
      scopes: of each program, the named scope of each operation.
      memory: (seconds, bytes) as time went on.
    """

    trace: Trace
    works: Mapping[str, Work]
    ceilings: Ceilings
    compiled: Mapping[str, float]
    scopes: Mapping[str, Mapping[str, str]]
    memory: Sequence[tuple[float, float]]


def run(config: ConfigDict, workdir: str, *, steps: int, command: list[str]) -> Profile:
    """Train until so many steps are traced, and read what they left. Evaluations are left out."""
    config = config.copy_and_resolve_references()
    config.profile.steps = steps
    config.steps = config.profile.start_step + steps - 1
    config.eval.data, config.eval.best, config.data.epochs, config.checkpoint.every = "", "", 0.0, 0
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    config.log.every, config.log.rollouts = 1, rows  # their lengths are counted
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
        ceilings=_ceilings(job, count if device.gpu else 1),  # a CPU's devices share it
        compiled=dict(compiled),
        scopes=scopes(folder / FOLDER / HLO),
        memory=timeline(folder / FOLDER / MEMORY),
    )


def lengths(file: pathlib.Path, first: int) -> dict[int, list[tuple[int, int]]]:
    """Tokens of (prompt, response) of every rollout from step `first` on, by step."""
    out: dict[int, list[tuple[int, int]]] = {}
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line and (row := json.loads(line))["step"] >= first:
            pair = len(row["prompt_ids"]), len(row["response_ids"])
            out.setdefault(row["step"], []).append(pair)
    return out


def works(job: Workload, steps: Mapping[int, Sequence[tuple[int, int]]]) -> dict[str, Work]:
    """Operations and bytes of each stage over the steps, nothing recomputed, padding left out.

    Golden solutions, whose lengths a run does not write, are left out as well.
    """
    found: dict[str, list[Work]] = {"rollout": [], "score": [], "update": []}
    for pairs in steps.values():
        prompt_B, response_B = (list(column) for column in zip(*pairs, strict=True))
        whole_B = [p + r for p, r in pairs]
        size = job.itemsize
        found["rollout"] += flops.prefill(job.student, prompt_B, itemsize=size)
        found["rollout"] += flops.decode(job.student, prompt_B, response_B, itemsize=size)
        for model in (job.student, job.teacher):
            if model is not None:
                found["score"].append(flops.forward(model, whole_B, itemsize=size))
        found["update"] += flops.update(job.student, whole_B, itemsize=size)
        if job.reference is not None:
            found["update"].append(flops.forward(job.reference, whole_B, itemsize=size))
        if job.over_vocabulary and job.teacher is not None:
            weights = flops.head_parameters(job.teacher)
            found["update"].append(Work(2.0 * weights * sum(whole_B), 1.0 * size * weights))
    return {
        stage: Work(sum(one.flops for one in each), sum(one.bytes for one in each))
        for stage, each in found.items()
        if each
    }


def scopes(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Of each program whose compiled text XLA left in the folder, the scope of each operation."""
    out: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*after_optimizations.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        name = text.removeprefix("HloModule ").split(",")[0].split()[0]
        out.setdefault(name, {}).update(trace.scopes_of(text))
    return out


def timeline(file: pathlib.Path) -> list[tuple[float, float]]:
    """The memory timeline of a trace; empty where none was written."""
    if not file.is_file():
        return []
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [(row["s"], row["bytes"]) for row in rows]


def report(found: Profile) -> str:
    """The tables, as text."""
    return "\n\n".join([
        stage_table(found.trace, found.works, found.ceilings),
        scope_table(found.trace, found.scopes),
        operation_table(found.trace, found.scopes),
        compile_table(found.compiled),
        _memory_line(found.memory),
    ])  # fmt: skip


def stage_table(found: Trace, works: Mapping[str, Work], limits: Ceilings) -> str:
    """Seconds a step by stage, and the share of the machine's ceilings that each reaches.

    MFU: operations that cannot be left out / seconds / the best matrix product's rate.
    """
    rows = [["stage", "s a step", "share", "device s", "GFLOP", "MFU", "GB", "bandwidth"]]
    busy, count = trace.by_stage(found.operations), max(found.count, 1)
    for name, seconds in [*found.stages.items(), ("rest", found.rest)]:
        work = works.get(name)
        rows.append([
            name, f"{seconds / count:.3f}", f"{seconds / found.steps:.1%}",
            f"{busy[name] / count:.3f}" if name in busy else "-",
            *(_of_ceiling(work.flops / count, seconds / count, limits.flops_per_s) if work else ("-", "-")),
            *(_of_ceiling(work.bytes / count, seconds / count, limits.bytes_per_s) if work else ("-", "-")),
        ])  # fmt: skip
    rows.append(["step", f"{found.steps / count:.3f}", "100.0%", *["-"] * 5])
    title = (
        f"{found.count} steps; ceilings measured: {limits.flops_per_s / 1e12:.3f} TFLOP/s, "
        f"{limits.bytes_per_s / 1e9:.1f} GB/s"
    )
    return "\n".join([title, *aligned(rows, left=(0, 1))])


def scope_table(found: Trace, scopes: Mapping[str, Mapping[str, str]]) -> str:
    """The device's seconds a step by stage and named scope."""
    total = sum(one.seconds for one in found.operations) or 1.0
    rows = [["stage", "scope", "device s a step", "share"]]
    for (stage, scope), seconds in trace.by_scope(found.operations, scopes).items():
        if seconds >= 0.005 * total:
            rows.append([stage, scope, f"{seconds / found.count:.4f}", f"{seconds / total:.1%}"])
    return "\n".join(aligned(rows, left=(0, 1)))


def operation_table(found: Trace, scopes: Mapping[str, Mapping[str, str]]) -> str:
    """The operations that took most."""
    rows = [["program", "operation", "scope", "times", "s a step"]]
    for one in found.operations[:_TOP]:
        scope = trace.scope_of(one, scopes)
        seconds = f"{one.seconds / found.count:.4f}"
        rows.append([one.program, one.name[:40], scope, str(one.count // found.count), seconds])
    return "\n".join(aligned(rows, left=(0, 1)))


def compile_table(compiled: Mapping[str, float]) -> str:
    """Seconds of compiling by program, the longest first."""
    rows = [["program", "compiled in s"]]
    longest = sorted(compiled.items(), key=lambda item: -item[1])
    rows += [[name, f"{seconds:.2f}"] for name, seconds in longest[:_TOP]]
    rows.append(["in all", f"{sum(compiled.values()):.2f}"])
    return "\n".join(aligned(rows, left=(0, 1)))


def to_json(found: Profile) -> dict[str, Any]:
    """The figures, as profile/summary.json has them."""
    return {
        "steps": found.trace.count,
        "step_s": found.trace.steps,
        "stages_s": dict(found.trace.stages),
        "device_s": trace.by_stage(found.trace.operations),
        "work": {name: dataclasses.asdict(work) for name, work in found.works.items()},
        "ceilings": dataclasses.asdict(found.ceilings),
        "compile_s": dict(found.compiled),
        "scopes_s": {
            "/".join(key): seconds
            for key, seconds in trace.by_scope(found.trace.operations, found.scopes).items()
        },
        "memory_peak_bytes": max((size for _, size in found.memory), default=None),
    }


def _listen() -> dict[str, float]:
    """Seconds of compiling by program from now on."""
    seconds: dict[str, float] = {}

    def heard(event: str, duration_secs: float, **given: str | int) -> None:
        if event == _COMPILED:
            name = str(given.get("fun_name", "-"))
            seconds[name] = seconds.get(name, 0.0) + duration_secs

    monitoring.register_event_duration_secs_listener(heard)
    return seconds


def _ceilings(job: Workload, count: int) -> Ceilings:
    """Of so many devices like the first."""
    dtype = jnp.float32 if job.itemsize == 4 else jnp.bfloat16
    rows = min(job.microbatch_tokens, 8192)
    shapes = [(2048, 2048, 2048), *ceilings.products_of(job.student, rows)]
    copy = _COPY_GIB.get(jax.default_backend(), 1.0)
    one = ceilings.measure(shapes, dtype=dtype, copy_gib=copy, repeats=3)[0]
    return Ceilings(one.bytes_per_s * count, one.flops_per_s * count)


def _of_ceiling(amount: float, seconds: float, rate: float) -> tuple[str, str]:
    """In billions, and its share of what the machine could have done meanwhile."""
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
