"""The token loop of a 1.5B model, 64 slots of 8192: caches in place, nothing copied, one graph a token."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import decoder
from opd_jax.rollout.decode_state import decode_chunk, empty
from opd_jax.rollout.sampling import SamplingParams
from tests.h200.conftest import QWEN_1_5B

SLOTS, TOTAL = 64, 8192


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """Where the compiler writes what it made."""
    return tmp_path_factory.mktemp("dump")


@pytest.fixture
def compiled(on_h200, fused_attention, dump):
    params = decoder.abstract_params(QWEN_1_5B)
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), params)
    model = decoder.Model(QWEN_1_5B, jax.eval_shape(decoder.unstack, params))
    state = jax.eval_shape(lambda model: empty(model, SLOTS, TOTAL, 0), model)
    sampling = SamplingParams(0, stop_ids=(151_643,), vocabulary=151_665)
    return decode_chunk.lower(
        on_h200(model), on_h200(state), on_h200(np.int32(0)), sampling, steps=128
    ).compile(compiler_options={"xla_dump_to": str(dump)})  # fmt: skip


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


def test_the_body_of_the_token_loop_is_one_command_buffer(compiled, dump):
    """A CUDA graph a token: what the host launches is one thing, whatever the number of layers."""
    (file,) = dump.glob("*thunk_sequence_after_thunk_passes.txt")
    body = file.read_text().partition("\n  body:\n")[2].splitlines()
    indents = [len(line) - len(line.lstrip()) for line in body]
    end = next((i for i, n in enumerate(indents) if n < 4), len(body))
    launched = [line.split()[1] for line, n in zip(body[:end], indents, strict=False) if n == 4]
    assert launched == ["kCommandBuffer"]
    inside = [line.split()[1] for line, n in zip(body[:end], indents, strict=False) if n == 8]
    assert inside.count("kCuDnn") == QWEN_1_5B.num_layers  # it really is the model
    print(f"{len(inside)} kernels a token in one graph")


def test_the_rows_of_a_scatter_into_a_cache_are_known_to_differ(compiled):
    """Else each 16-bit number is written by a loop of compare-and-swap."""
    into = re.findall(r"= bf16\[\S* scatter\(.*", compiled.as_text())
    assert len(into) == 2 * QWEN_1_5B.num_layers
    assert all("unique_indices=true" in line for line in into)
