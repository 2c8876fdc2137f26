"""The products of a stage: how many, of which shapes, and how they stand beside a row."""

import jax
import jax.numpy as jnp
import pytest

from opd_jax.models import Model, ModelConfig, decoder
from opd_jax.rollout import decode_state
from opd_jax.tools.bench import floors, report
from opd_jax.tools.bench.measure import Row

pytestmark = pytest.mark.short

CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=11, hidden_size=4, intermediate_size=6, num_layers=2,
    num_heads=3, num_kv_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, max_position=64,
    tie_embeddings=False, qkv_bias=False, qk_norm=True, eos_token_ids=(0,),
)  # fmt: skip


def multiplications(products) -> int:
    """Pairs of numbers that the products multiply, from the sizes of all axes."""
    total = 0
    for axes, a, b in products:
        left, right = axes.split("->")[0].split(",")
        sizes = dict(zip(left, a, strict=True)) | dict(zip(right, b, strict=True))
        count = 1
        for size in sizes.values():
            count *= size
        total += count
    return total


def test_products_of_a_layer_by_hand():
    """5 rows of 8 tokens: a token's weights, and half of the 8 x 8 pairs of positions."""
    weights = 4 * 6 + 2 * (4 * 2) + 6 * 4 + 2 * (4 * 6) + 6 * 4  # q; k, v; output; gate, up; down
    pairs = 2 * 3 * 2 * 8 * 4  # scores and values, heads, head_dim, queries, half of the keys
    assert multiplications(floors.layer(CONFIG, 5, 8)) == 40 * weights + 5 * pairs
    assert multiplications(floors.output(CONFIG, 15)) == 15 * 4 * 11
    assert floors.output(CONFIG, 0) == []


def test_the_gradient_has_two_products_for_each():
    forward = floors.layer(CONFIG, 5, 8) + floors.output(CONFIG, 15)
    backward = floors.backward(forward)
    assert len(backward) == 2 * len(forward)
    assert multiplications(backward) == 2 * multiplications(forward)
    for (_, a, b), of_a, of_b in zip(forward, backward[::2], backward[1::2], strict=True):
        for (axes, *shapes), operand in ((of_a, a), (of_b, b)):
            arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            gradient = jax.eval_shape(lambda x, y, axes=axes: jnp.einsum(axes, x, y), *arrays)
            assert gradient.shape == operand


def test_micro_batches_are_those_of_a_stage():
    """7 rows of 8 tokens, at most 24 tokens at a time: 3, 3 and 1 row, of two layers and logits each."""
    known = {}
    for rows, seconds in ((3, 1.0), (1, 0.1)):
        for products, times in (
            (floors.layer(CONFIG, rows, 8), 1),
            (floors.output(CONFIG, rows), 10),
        ):
            known[tuple(products)] = times * seconds
            known[tuple(floors.backward(products))] = 2 * times * seconds
    measured, sizes = floors.Floors(known=known), {"logits": 1, "most_tokens": 24}
    assert measured.forward(CONFIG, 7, 8, **sizes) == pytest.approx((2 + 10) * 2.1)
    assert measured.backward(CONFIG, 7, 8, **sizes) == pytest.approx(2 * (2 + 10) * 2.1)


def test_products_that_belong_together_are_measured_once():
    measured = floors.Floors()
    products = floors.output(CONFIG, 3)
    assert measured.seconds(products) == measured.seconds(products) > 0
    assert measured.seconds([]) == 0
    assert list(measured.known) == [tuple(products)]


def test_products_of_a_decode_step_read_every_weight():
    """Every kernel and the output matrix once, and two products for each block of positions."""
    params = decoder.init(jax.random.key(0), CONFIG)
    model = decode_state.unstack(Model(CONFIG, params))
    out = floors.decode_step(model, 3, 16, 9)()
    kernels, attention = CONFIG.num_layers * 7, CONFIG.num_layers
    assert len(out) == kernels + 1 + attention
    assert out[kernels].shape == (3, CONFIG.vocab_size)


def test_the_table_has_the_ratio_to_the_floor():
    row = Row("score", "8 x 8", median_s=0.5, floor_s=0.4, fraction=0.3, bound="compute")
    head, line = report.table([row, Row("other", median_s=1.0)]).splitlines()[:2]
    end = head.index("x floor") + len("x floor")
    assert line[:end].endswith("1.25")
