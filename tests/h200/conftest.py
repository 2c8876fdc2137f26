"""Compiling for an NVIDIA H200 on a machine without one: what the compiler says, nothing is executed.

Autotuning needs the device, so kernels differ from a real run's; memory and structure are the real
ones. Every test here needs JAX's CUDA plug-in and is skipped without it.
"""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.models import ModelConfig, attention

HERE = pathlib.Path(__file__).parent
QWEN_1_5B = ModelConfig(
    model_type="qwen2", vocab_size=151_936, hidden_size=1536, intermediate_size=8960,
    num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6,
    max_position=32_768, tie_embeddings=True, qkv_bias=True, qk_norm=False, eos_token_ids=(151_643,),
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.h200)


@pytest.fixture(scope="session", autouse=True)
def _needs_the_plug_in() -> None:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("wanted jax[cuda13], to compile for an H200")


@pytest.fixture(scope="session")
def on_h200(_needs_the_plug_in: None) -> Callable[[Any], Any]:
    """Shapes and dtypes of a tree of arrays (or of their shapes), placed on one H200."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=(HERE / "target_config.txtpb").read_text(),
        topology="1x1x1",
    )
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    place = NamedSharding(mesh, PartitionSpec())

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x, np.float32).dtype
        return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=place)

    return lambda tree: jax.tree.map(abstract, tree)


@pytest.fixture
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU: the backend of this process is the CPU."""
    monkeypatch.setattr(attention, "fused", lambda dtype: dtype == np.dtype("bfloat16"))
