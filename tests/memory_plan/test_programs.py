"""Programs for devices that this process does not have."""

import jax
import jax.numpy as jnp
import pytest

from configs import stable_opd
from opd_jax import hardware
from opd_jax.memory_plan import report
from opd_jax.memory_plan.workload import of_config
from opd_jax.models import attention, kv_cache
from tests.conftest import tiny_config

pytestmark = pytest.mark.short


def test_what_was_traced_for_one_backend_is_not_used_for_another():
    """The layouts of the cache differ; the arguments do not, and they are what JAX's caches compare."""
    init = jax.jit(lambda: kv_cache.init(tiny_config(), 2, 128, jnp.bfloat16))
    traced = []
    for backend in ("cpu", "gpu", "cpu"):
        with attention.BACKEND(backend):
            traced.append(jax.eval_shape(init))
    shapes = [caches[0][0][0].shape for caches in traced]
    heads, size = tiny_config().num_kv_heads, tiny_config().head_dim
    assert shapes == [(2, heads, size, 128), (2, 128, heads, size), (2, heads, size, 128)]


def test_attention_without_cudnn_on_a_gpu(monkeypatch):
    """mesh.attention=plain, where this process runs on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = []
    try:
        for kind in attention.KINDS:
            attention.choose(kind)
            found.append(attention.fused(jnp.bfloat16))
    finally:
        attention.choose("auto")
    assert found == [True, False]


def test_the_plan_knows_attention_without_cudnn():
    """A row's weights of attention are in memory then, so an update has larger temporaries."""
    config = stable_opd.get_config("qwen2.5-math-1.5b,data=problems.jsonl")
    workloads = []
    for config.mesh.attention in attention.KINDS:
        workloads.append(of_config(config, hardware.find("h200"), 1))
    assert [workload.fused for workload in workloads] == [True, False]
    kernel, none = (
        next(p for name, p in report.programs(w).items() if name.startswith("gradient"))
        for w in workloads
    )
    assert none.temporary_bytes > kernel.temporary_bytes
