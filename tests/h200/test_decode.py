"""The token loop of a 1.5B model, 64 slots of 8192: caches in place, nothing copied, one graph a token."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import decoder
from opd_jax.rollout.decoding import decode_chunk, empty
from tests.h200.conftest import QWEN_1_5B

SLOTS, TOTAL = 64, 8192


@pytest.fixture
def compiled(on_h200, fused_attention):
    params = decoder.abstract_params(QWEN_1_5B)
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), params)
    layers = jax.eval_shape(decoder.unstack, params)
    state = jax.eval_shape(lambda layers: empty(layers, QWEN_1_5B, SLOTS, TOTAL, 0), layers)
    return decode_chunk.lower(
        on_h200(layers), QWEN_1_5B, on_h200(state), on_h200(np.int32(0)),
        steps=128, temperature=1.0, top_p=1.0, top_k=0, stop_ids=(151_643,), vocabulary=151_665,
        drawn_V=None, scored_V=None, stop_on_repetition=0,
    ).compile()  # fmt: skip


def test_the_token_loop_copies_nothing(compiled):
    memory = compiled.memory_analysis()
    caches = 2 * 2 * QWEN_1_5B.num_layers * SLOTS * TOTAL * 2 * 128  # keys and values, bfloat16
    assert memory.alias_size_in_bytes >= caches
    assert memory.temp_size_in_bytes < 0.1 * 2**30
    text = compiled.as_text()
    one_cache = rf"bf16\[{SLOTS},{TOTAL},2,128\]"
    assert not re.findall(rf"= {one_cache}\S* (?:copy|transpose)\(", text)
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == QWEN_1_5B.num_layers
    print(f"temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB, "
          f"aliased {memory.alias_size_in_bytes / 2**30:.2f} GiB")  # fmt: skip
