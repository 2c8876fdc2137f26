"""The table of devices: by name, as JAX calls them, and the settings that are recorded."""

import os
import tomllib

import jax
import pytest

from opd_jax import hardware
from opd_jax.errors import ConfigError
from opd_jax.training import roles
from tests.support.paths import ROOT

pytestmark = pytest.mark.short


@pytest.mark.parametrize(
    ("called", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
    ],
)
def test_as_jax_calls_them(called, kind):
    found = hardware.of_jax(called, "gpu")
    assert found is not None
    assert found.kind == kind


def test_an_unknown_gpu_has_no_plan():
    assert hardware.of_jax("NVIDIA GeForce RTX 4090", "gpu") is None


@pytest.mark.parametrize("platform", ["tpu", "METAL", "xpu"])
def test_platforms_that_nothing_is_written_for_are_refused(platform):
    with pytest.raises(ConfigError, match=f"a {platform} here, wanted an NVIDIA GPU or a CPU"):
        hardware.require_supported(platform)
    hardware.require_supported("cpu")
    hardware.require_supported("gpu", jax_version="0.11.2", python=(3, 12))


@pytest.mark.parametrize(
    ("version", "python", "refused"),
    [
        ("0.10.2", (3, 11), True),
        ("0.11.1", (3, 12), True),
        ("0.11.2", (3, 11), True),
        ("0.11.2", (3, 12), False),
        ("0.11.2.dev20260801", (3, 12), False),  # of NVIDIA's images
        ("0.12.0.1", (3, 13), False),
        ("1.0", (3, 12), False),
    ],
)
def test_an_old_jax_is_refused_on_a_gpu_alone(version, python, refused):
    hardware.require_supported("cpu", jax_version=version, python=python)
    if not refused:
        hardware.require_supported("gpu", jax_version=version, python=python)
        return
    with pytest.raises(ConfigError) as error:
        hardware.require_supported("gpu", jax_version=version, python=python)
    text = str(error.value)
    assert "\n" not in text
    assert (
        f"jax {version} on Python {python[0]}.{python[1]} computes on a GPU here, wanted jax"
        in text
    )
    assert "0.11.2 or newer on Python 3.12 or newer" in text


def test_the_extra_wants_what_a_gpu_is_used_with():
    """pip then refuses Python 3.11 by itself: that JAX requires 3.12. A marker could only leave JAX out."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = ".".join(map(str, hardware.GPU_JAX))
    assert table["project"]["optional-dependencies"]["cuda"] == [f"jax[cuda13]>={wanted}"]


def test_a_cpu_has_what_is_free():
    cpu = hardware.of_jax("cpu", "cpu")
    assert cpu is not None
    assert 0 < cpu.memory_gib <= hardware.whole_host_bytes() / 2**30
    assert hardware.find("h200").memory_gib == 139


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="device_kind='h20' is not known, wanted one of h200"):
        hardware.find("h20")


def test_the_share_of_a_gpu_is_what_the_environment_says():
    assert hardware.memory_fraction({}) == hardware.MEMORY_FRACTION
    assert hardware.memory_fraction({"XLA_CLIENT_MEM_FRACTION": "0.8"}) == 0.8
    assert hardware.memory_fraction({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}) == 0.5


def test_without_a_figure_of_what_is_available_all_memory_counts_as_free(monkeypatch):
    """Outside Linux there is no /proc/meminfo."""
    monkeypatch.setattr(hardware, "_group_limit", lambda: 2**62)
    monkeypatch.setattr(hardware, "_group_use", lambda: 0)
    monkeypatch.setattr(hardware, "_meminfo", dict)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.free_host_bytes() == hardware.whole_host_bytes() == total
    monkeypatch.setattr(hardware, "_meminfo", lambda: {"MemAvailable": 5 * 2**30})
    assert hardware.free_host_bytes() == 5 * 2**30


def test_a_control_group_bounds_the_memory(monkeypatch):
    """Of a limit of 3 GiB one is used, although the machine has 5 GiB available."""
    monkeypatch.setattr(hardware, "_meminfo", lambda: {"MemAvailable": 5 * 2**30})
    monkeypatch.setattr(hardware, "_group_limit", lambda: 3 * 2**30)
    monkeypatch.setattr(hardware, "_group_use", lambda: 2**30)
    assert hardware.free_host_bytes() == 2 * 2**30


@pytest.mark.parametrize(("text", "number"), [("4096\n", 4096), ("max\n", 7), ("", 7), (None, 7)])
def test_numbers_of_a_control_group(text, number, tmp_path):
    """A group without a limit says "max"; where there are no groups there is no file."""
    file = tmp_path / "memory.max"
    if text is not None:
        file.write_text(text)
    assert hardware._group_number(str(file), 7) == number  # an absolute name is taken as it is


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_share_of_a_gpu_is_set_unless_the_user_has(name, monkeypatch):
    for other in hardware._FRACTIONS:
        monkeypatch.setenv(other, "")  # put back after the test
        monkeypatch.delenv(other)
    hardware.set_memory_fraction()
    assert hardware.memory_fraction() == 0.92
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv(name, "0.5")
    hardware.set_memory_fraction()
    assert hardware.memory_fraction() == 0.5


def test_settings_that_are_recommended_and_not_set():
    set_ = {"XLA_CLIENT_MEM_FRACTION": "0.92", "XLA_FLAGS": "--a", "HOME": "/root"}
    found = hardware.record(hardware.find("a100-80"), set_)
    assert found == {
        "set": {"XLA_FLAGS": "--a", "XLA_CLIENT_MEM_FRACTION": "0.92"},
        "recommended_but_not_set": {"JAX_OPTIMIZATION_LEVEL": "O1"},
    }
    assert hardware.record(None, {}) == {"set": {}, "recommended_but_not_set": {}}
    of_nccl = {"NCCL_DEBUG": "INFO", "NCCL_P2P_DISABLE": "1"}
    assert hardware.record(None, of_nccl | {"MYNCCL_A": "1"})["set"] == of_nccl


@pytest.mark.parametrize(
    ("dtypes", "gpu", "current", "wanted"),
    [
        (["bfloat16", "float32"], True, None, "float32"),
        (["bfloat16", "bfloat16"], True, None, None),
        (["float32"], True, "tensorfloat32", None),  # the user has decided
        (["float32"], False, None, None),
    ],
)
def test_float32_models_ask_for_full_products(dtypes, gpu, current, wanted):
    assert hardware.matmul_precision(dtypes, gpu=gpu, current=current) == wanted


def test_the_precision_is_set_on_a_gpu_alone(monkeypatch):
    before = jax.config.values["jax_default_matmul_precision"]
    assert roles.ask_for_full_products(["float32"]) == []
    assert jax.config.values["jax_default_matmul_precision"] == before
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        assert roles.ask_for_full_products(["auto"]) == []  # bfloat16 there
        (line,) = roles.ask_for_full_products(["auto", "float32"])
        assert "full precision instead of TF32" in line
        assert jax.config.values["jax_default_matmul_precision"] == "float32"
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_the_allocator_is_set_where_jax_reads_it():
    environment = {}
    hardware.set_allocator("default", environment)
    assert environment == {}
    hardware.set_allocator("vmm", environment)
    wanted = {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "vmm",
        "JAX_PJRT_CLIENT_CREATE_OPTIONS": "allocator:vmm",
    }
    assert environment == wanted
    assert hardware.record(None, environment)["set"] == wanted
    environment = {"JAX_PJRT_CLIENT_CREATE_OPTIONS": "a:1;allocator:bfc"}
    hardware.set_allocator("cuda_async", environment)
    assert environment["JAX_PJRT_CLIENT_CREATE_OPTIONS"] == "a:1;allocator:cuda_async"


def test_the_allocators_are_those_that_jax_knows(monkeypatch):
    from jaxlib import xla_client

    for name in hardware.ALLOCATORS:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", name)
        if name in ("vmm", "address") and jax.version.__version_info__ < hardware.GPU_JAX:
            continue  # an older JAX is not used on a GPU
        assert xla_client.generate_pjrt_gpu_plugin_options()["allocator"] == name


@pytest.mark.parametrize(
    ("name", "on_gpu", "on_cpu"),
    [("auto", "bfloat16", "float32"), ("float32",) * 3, ("bfloat16",) * 3],
)
def test_the_dtype_that_auto_stands_for(name, on_gpu, on_cpu):
    assert hardware.dtype_name(name, gpu=True) == on_gpu
    assert hardware.dtype_name(name, gpu=False) == on_cpu
