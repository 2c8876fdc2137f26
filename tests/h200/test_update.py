"""The update of a 1.5B model at 16,384 tokens: its memory, and that attention is not computed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import decoder
from opd_jax.training import objective, update
from opd_jax.training.terms import ON_ROLLOUTS, default_terms
from opd_jax.types import Frozen, RolloutRows
from tests.h200.conftest import QWEN_1_5B

ROWS, WIDTH = 2, 8192
FORWARD = 'custom_call_target="__cudnn$fmhaSoftmax"'
BACKWARD = 'custom_call_target="__cudnn$fmhaSoftmaxBackward"'


def compile_gradient(on_h200, remat: str, token_chunk: int = 1024):
    """A micro-batch's pass of the update: float32 masters, bfloat16 compute, gradients summed."""
    loss = objective.make_rollout_loss(
        default_terms(pg_weight=1.0), QWEN_1_5B,
        token_chunk=token_chunk, remat=remat,
    )  # fmt: skip
    array_BT = np.zeros((ROWS, WIDTH), np.float32)
    rows = RolloutRows(
        tokens_BT=array_BT.astype(np.int32), length_B=np.zeros(ROWS, np.int32),
        weight_BT=array_BT, advantage_BT=array_BT, sampler_logprob_BT=array_BT,
    )  # fmt: skip
    params = on_h200(decoder.abstract_params(QWEN_1_5B))
    weights = {name: np.float32(1) for name in ON_ROLLOUTS}
    add = update.make_add(loss, jnp.bfloat16)
    arguments = (params, Frozen(), on_h200(rows), on_h200(weights), params)
    return add.lower(*arguments).compile()


def figures(compiled) -> tuple[float, int, int]:
    """Temporaries in GiB; calls of the fused attention, forward and backward."""
    text = compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
    return temporary, text.count(FORWARD), text.count(BACKWARD)


@pytest.mark.parametrize(("remat", "attentions"), [("attention", 1), ("full", 2)])
def test_the_update_at_16k_tokens(on_h200, fused_attention, remat, attentions):
    compiled = compile_gradient(on_h200, remat)
    temporary, forward, backward = figures(compiled)
    assert temporary < 8
    assert (forward, backward) == (attentions, 1)  # in the bodies of the two scans over layers
    params = decoder.abstract_params(QWEN_1_5B)
    gradient = sum(4 * w.size for w in jax.tree.leaves(params))
    assert compiled.memory_analysis().alias_size_in_bytes >= gradient  # summed in place
