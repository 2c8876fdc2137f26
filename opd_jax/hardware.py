"""Kinds of devices in one table: memory, achievable rates, links, and recommended settings.

This module does not import JAX: an entry point sets the environment from it before JAX starts.
"""

import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from importlib import metadata

from opd_jax.errors import ConfigError

GIB = 2**30
# Share of a GPU's memory that JAX may use; JAX's own default is three quarters. The rest is left for
# memory that XLA does not count: the driver's context, NCCL's buffers, cuBLAS and cuDNN handles.
MEMORY_FRACTION = 0.92
GPU_JAX, GPU_PYTHON = (0, 11, 2), (3, 12)  # the oldest versions with which a GPU is used
ALLOCATORS = ("default", "bfc", "cuda_async", "vmm", "platform", "address")  # of jaxlib 0.11.2
_ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"
_CLIENT_OPTIONS = "JAX_PJRT_CLIENT_CREATE_OPTIONS"
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # new name, old name
_RECORDED = ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL", "CUDA_DEVICE_MAX_CONNECTIONS",
             "OPD_JAX_MALLOC", _ALLOCATOR, _CLIENT_OPTIONS, *_FRACTIONS)  # fmt: skip
_RECORDED_STARTS = ("NCCL_",)  # every variable whose name starts so is recorded too


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; rates are those that programs achieve, not those of the data sheet.

    Attributes:
      kind: its name on the command line.
      memory_gib: the memory that the driver offers.
      bytes_per_s: of a copy. flops_per_s: of the best matrix product in the compute dtype.
      link_bytes_per_s: of a device's collectives within a node, in one direction.
      network_bytes_per_s: the same between nodes, a device's share.
      per_node: number of devices that the link connects.
      kernel_s: time from one small kernel to the next inside a CUDA graph.
      gpu: whether it computes in bfloat16 with fused attention; else float32 and plain XLA.
      source: where the numbers come from.
      settings: recommended environment variables.
    """

    kind: str
    memory_gib: float
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    per_node: int
    kernel_s: float
    gpu: bool
    source: str
    settings: Mapping[str, str]


# O1 turns on the latency-hiding scheduler and pipelined collectives; a single hardware queue keeps the
# order of collectives and products that the scheduler chose; NVLS reduces inside the NVSwitch.
_AMPERE = {"XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION), "JAX_OPTIMIZATION_LEVEL": "O1"}
_HOPPER = _AMPERE | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_NVLS_ENABLE": "1"}

DEVICES = {
    device.kind: device
    for device in (
        Device(
            "h200", 139.0, 4.3e12, 790e12, 340e9, 38e9, 8, 2e-6, True, settings=_HOPPER,
            source="copy and 8192^3 bfloat16 product as measured on one H200; links: 3/4 of "
            "NVLink 4's 450 GB/s and of 400 Gb/s a device (NVIDIA data sheet)",
        ),
        Device(
            "h100", 79.6, 3.0e12, 750e12, 340e9, 38e9, 8, 2e-6, True, settings=_HOPPER,
            source="NVIDIA data sheet (SXM): 9/10 of 3.35 TB/s, 3/4 of 989 TFLOP/s, links as h200",
        ),
        Device(
            "a100-80", 79.3, 1.8e12, 250e12, 225e9, 19e9, 8, 2e-6, True, settings=_AMPERE,
            source="NVIDIA data sheet (SXM): 9/10 of 2.04 TB/s, 4/5 of 312 TFLOP/s, 3/4 of "
            "NVLink 3's 300 GB/s and of 200 Gb/s",
        ),
        Device(
            "a100-40", 39.6, 1.4e12, 250e12, 225e9, 19e9, 8, 2e-6, True, settings=_AMPERE,
            source="NVIDIA data sheet (SXM): 9/10 of 1.56 TB/s, else as a100-80",
        ),
        Device(
            "cpu", 0.0, 29e9, 0.12e12, 10e9, 1e9, per_node=1, kernel_s=0.0, gpu=False, settings={},
            source="memory: what is free; copies as on 2 cores of an AMD EPYC "
            "(docs/measurements/benchmarks.md); the other rates are guesses, so that no time is estimated",
        ),
    )
}  # fmt: skip


def find(kind: str) -> Device:
    """Return the device with this name on the command line. Raises ConfigError for an unknown name."""
    if kind not in DEVICES:
        raise ConfigError(f"device_kind={kind!r} is not known, wanted one of {', '.join(DEVICES)}")
    device = DEVICES[kind]
    if device.gpu:
        return device
    return dataclasses.replace(device, memory_gib=free_host_bytes() / GIB)


def dtype_name(name: str, *, gpu: bool) -> str:
    """The dtype that a role's field `dtype` stands for: auto is bfloat16 on a GPU, float32 on a CPU."""
    if name != "auto":
        return name
    return "bfloat16" if gpu else "float32"


def matmul_precision(dtypes: Sequence[str], *, gpu: bool, current: str | None) -> str | None:
    """Return the `jax_default_matmul_precision` that models of these compute dtypes need; None: as it is.

    By default a GPU multiplies float32 numbers as TF32, with 10 bits of the fraction (jax-ml/jax issue
    12008), so that "float32" would be less exact than it says. A precision that the user has set, `current`,
    is kept. Products of bfloat16 numbers are the same with any precision.
    """
    full = gpu and current is None and "float32" in dtypes
    return "float32" if full else None


def tile(*, gpu: bool) -> int:
    """Return the number that the widths of batches are multiples of: 128 tokens on a GPU, else 1.

    Matrix products there are made of tiles of 128 rows, and cuDNN's attention has had wrong gradients at
    widths with T % 128 == 64 (pytorch/pytorch issue 196678).
    """
    return 128 if gpu else 1


def require_supported(
    platform: str, *, jax_version: str | None = None, python: tuple[int, ...] = sys.version_info[:2]
) -> None:
    """Refuse a platform of JAX (`jax.default_backend()`) that is not supported, such as TPUs.

    Raises ConfigError for any platform but cpu and gpu. On others models would compute in float32, and
    attention would materialise its weights [B, N, T, T]: 9.5 GB for a row of the paper's lengths. On a GPU
    also for a JAX before 0.11.2 (`jax_version`; None: the installed one): before 0.11.1 a scan under vmap
    could compute wrong results there (jax-ml/jax issue 36958), and such a JAX is all that Python 3.11 gets.
    """
    if platform not in ("cpu", "gpu"):
        raise ConfigError(
            f"JAX computes on a {platform} here, wanted an NVIDIA GPU or a CPU: {platform}s are not "
            "supported (no fused attention, no bfloat16); start on a GPU, or set JAX_PLATFORMS=cpu"
        )
    version = metadata.version("jax") if jax_version is None else jax_version
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if platform == "gpu" and (numbers < GPU_JAX or python < GPU_PYTHON):
        raise ConfigError(
            f"jax {version} on Python {'.'.join(map(str, python))} computes on a GPU here, wanted jax "
            f"{'.'.join(map(str, GPU_JAX))} or newer on Python {'.'.join(map(str, GPU_PYTHON))} or newer "
            "(older ones have a miscompilation of scans on GPUs); install opd_jax[cuda] in a virtual "
            "environment of a newer Python, or set JAX_PLATFORMS=cpu"
        )


def of_jax(device_kind: str, platform: str) -> Device | None:
    """Return the device of JAX's name for it (`NVIDIA A100-SXM4-80GB`); None where it is not in the table."""
    if platform == "cpu":
        return find("cpu")
    name = device_kind.lower()
    model = "a100-80" if "a100" in name and "80" in name.split("a100")[1] else name
    for kind, device in DEVICES.items():
        family = kind.removesuffix("-40")
        if device.gpu and family in model:
            return device
    return None


def memory_fraction(environment: Mapping[str, str] = os.environ) -> float:
    """Return the share of a GPU that JAX may use, from the environment or as the entry points set it."""
    for name in _FRACTIONS:
        if name in environment:
            return float(environment[name])
    return MEMORY_FRACTION


def set_memory_fraction() -> None:
    """Let JAX use `MEMORY_FRACTION` of a GPU, unless the user has set another share."""
    if not any(name in os.environ for name in _FRACTIONS):
        os.environ[_FRACTIONS[0]] = str(MEMORY_FRACTION)


def set_allocator(name: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let JAX allocate a GPU's memory by this one of `ALLOCATORS`; call it before JAX starts.

    `default` changes nothing. It is set in both places that JAX reads: some versions ignore the variable of
    the allocator (jax 0.10.1 with the CUDA 13 plug-in), and the options of the client come last. Options
    that the user has set are kept.
    """
    if name == "default":
        return
    environment[_ALLOCATOR] = name
    options = [x for x in environment.get(_CLIENT_OPTIONS, "").split(";") if x]
    kept = [option for option in options if not option.startswith("allocator:")]
    environment[_CLIENT_OPTIONS] = ";".join([*kept, f"allocator:{name}"])


def record(device: Device | None, environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Return the settings for run.json: those that are set, and recommended ones that are not."""
    names = [name for name in sorted(environment) if name.startswith(_RECORDED_STARTS)]
    present = {name: environment[name] for name in (*_RECORDED, *names) if name in environment}
    recommended = {} if device is None else device.settings
    missing = {name: value for name, value in recommended.items() if present.get(name) != value}
    return {"set": present, "recommended_but_not_set": missing}


def free_host_bytes() -> int:
    """Return the memory that a process can still use, of the machine or of its control group."""
    values = _meminfo()
    free = values.get("MemAvailable", 0) or whole_host_bytes()
    return min(free, _group_limit() - _group_use())


def whole_host_bytes() -> int:
    """Return the total memory of the machine, or of the control group where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, _group_limit())


def _meminfo() -> dict[str, int]:
    file = pathlib.Path("/proc/meminfo")
    if not file.is_file():
        return {}
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _group_limit() -> int:
    return _group_number("memory.max", 2**62)


def _group_use() -> int:
    return _group_number("memory.current", 0)


def _group_number(name: str, otherwise: int) -> int:
    file = pathlib.Path("/sys/fs/cgroup") / name
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else otherwise
