"""Planned bytes against compiled ones: the real programs, compiled for the real shapes, never run."""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from opd_jax import hardware
from opd_jax.aot import Program
from opd_jax.errors import ConfigError
from opd_jax.hardware import Device
from opd_jax.memory_plan import collectives, report
from opd_jax.memory_plan import programs as real
from opd_jax.memory_plan.workload import Workload
from opd_jax.models import attention
from opd_jax.sharding.mesh import ONE, make_mesh

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Planned and compiled bytes of a program's arguments and temporaries, and seconds to compile it.

    `sent`: bytes that a device sends to others in one run (collectives.py).
    """

    program: str
    planned_arguments: float
    arguments: float
    planned_temporaries: float
    temporaries: float
    sent: float
    seconds: float


def compare(
    config: ConfigDict, workload: Workload, device: Device, target: pathlib.Path
) -> Iterator[Comparison]:
    """Compare the widest program of each kind, one after another.

    For a GPU they are compiled by JAX's CUDA plug-in, for `target`; for a CPU, by this process.

    Raises ConfigError: the plug-in or the description of the GPU is missing, or this process has another
    number of CPU devices than the layout.
    """
    place, mesh = None, ONE
    count = workload.layout.devices
    if device.gpu:
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            raise ConfigError(
                f"--verify for {device.kind} wants JAX's CUDA plug-in, which is not installed; "
                "pip install 'jax[cuda13]' (no GPU is needed), or --device_kind=cpu"
            )
        if not target.is_file():
            raise ConfigError(
                f"--target={target} does not exist; launch/bench.py writes such a file"
            )
        if count > 1:
            mesh = make_mesh(config.mesh, real.gpus(target, count))
        else:
            place = real.on_gpu(target)
    elif count > 1:
        if len(jax.devices()) != count:
            raise ConfigError(
                f"--verify with --devices={count} wants as many CPU devices, here are "
                f"{len(jax.devices())}; set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        mesh = make_mesh(config.mesh)
    config = config.copy_and_resolve_references()
    for role in ("student", "teacher", "reference"):
        config[role].dtype = hardware.dtype_name(config[role].dtype, gpu=device.gpu)
    attention.choose(config.mesh.attention)
    planned = report.programs(workload)
    for kind, program in widest(real.programs(config, workload, mesh), planned).items():
        began = time.perf_counter()
        compiled = real.compile_for(program, place, fused=workload.fused)
        found = compiled.memory_analysis()
        assert found is not None
        yield Comparison(
            program.name, planned[kind].argument_bytes, found.argument_size_in_bytes,
            planned[kind].temporary_bytes, found.temp_size_in_bytes,
            collectives.sent_bytes(compiled.as_text() or "", count) if count > 1 else 0.0,
            time.perf_counter() - began,
        )  # fmt: skip


def widest(programs: Sequence[Program], kinds: dict) -> dict[str, Program]:
    """Return the program of the widest rows of each kind: the first, of prompts the last."""
    found: dict[str, Program] = {}
    for program in programs:
        for kind in kinds:
            if program.name.startswith(kind) and (kind == "prefill" or kind not in found):
                found[kind] = program
    return found


def table(rows: Iterator[Comparison]) -> str:
    """Return a table in Markdown, one line for each program."""
    out = [
        "| program | arguments MiB planned | compiled | off | temporaries MiB planned | compiled | off "
        "| sent MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        out.append(
            f"| {row.program} | {row.planned_arguments / MIB:,.1f} | {row.arguments / MIB:,.1f} | "
            f"{_off(row.planned_arguments, row.arguments)} | {row.planned_temporaries / MIB:,.1f} | "
            f"{row.temporaries / MIB:,.1f} | {_off(row.planned_temporaries, row.temporaries)} | "
            f"{row.sent / MIB:,.1f} |"
        )
    return "\n".join(out)


def _off(planned: float, compiled: float) -> str:
    return f"{100 * (planned / compiled - 1):+.1f} %" if planned and compiled else "-"
