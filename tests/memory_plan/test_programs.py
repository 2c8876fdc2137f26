"""Programs for devices that this process does not have."""

import jax
import jax.numpy as jnp
import pytest

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
