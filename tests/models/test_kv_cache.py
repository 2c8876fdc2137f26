"""The cache against attention over whole rows, and that what lies beyond a row's length is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from opd_jax.models import kv_cache
from tests.conftest import tiny_config

pytestmark = pytest.mark.short

CONFIG = tiny_config(num_layers=1)  # 4 query heads on 2 key heads of 8
SLOTS = 2 * kv_cache.BLOCK + 44  # three blocks, the last not full


@pytest.fixture(scope="module")
def history() -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of three rows, [B, T, K, H]."""
    generator = np.random.default_rng(0)
    shape = (3, SLOTS, 2, 8)
    return tuple(generator.standard_normal(shape).astype(np.float32) for _ in range(2))


def filled(history, length) -> kv_cache.Cache:
    """A cache of the first `length` positions of every row, as prefill makes it."""
    empty = kv_cache.init(CONFIG, 3, SLOTS, jnp.float32)[0]
    return kv_cache.place(empty, *(x[:, :length] for x in history), jnp.arange(3))


def exact(query_NH, keys_TKH, values_TKH) -> np.ndarray:
    """Attention of one query to all given positions, in float64; 2 query heads a key head."""
    out = []
    for head, query_H in enumerate(query_NH.astype(np.float64)):
        keys, values = (x[:, head // 2].astype(np.float64) for x in (keys_TKH, values_TKH))
        out.append(scipy.special.softmax(keys @ query_H / np.sqrt(8)) @ values)
    return np.stack(out)


@pytest.mark.parametrize(
    "lengths", [(1, 2, 3), (kv_cache.BLOCK, 1, 5), (kv_cache.BLOCK + 1, SLOTS, kv_cache.BLOCK)]
)
def test_a_query_meets_the_first_positions_of_its_row(history, lengths):
    query = np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32)
    got = kv_cache.attend(jnp.asarray(query), filled(history, SLOTS), jnp.array(lengths))
    for row, length in enumerate(lengths):
        want = exact(query[row], *(x[row, :length] for x in history))
        np.testing.assert_allclose(got[row], want, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "widths"),
    [(9, [9]), (128, [128]), (129, [128, 1]), (512, [128] * 4), (513, [256, 256, 1])],
)
def test_a_row_is_a_few_blocks(positions, widths):
    (blocks,) = kv_cache.init(CONFIG, 3, positions, jnp.float32)
    assert [keys.shape for keys, _ in blocks] == [(3, 2, 8, width) for width in widths]
    assert [values.shape for _, values in blocks] == [(3, 2, width, 8) for width in widths]


def test_tokens_are_appended_at_their_positions(history):
    keys, values = history
    grown, position = filled(history, 5), jnp.array([5, 130, 2])
    grown = kv_cache.append(grown, keys[:, 7], values[:, 7], position)
    query = np.random.default_rng(2).standard_normal((3, 4, 8)).astype(np.float32)
    got = kv_cache.attend(jnp.asarray(query), grown, jnp.array([6, 1, 3]))
    for row, before in ((0, 5), (2, 2)):
        rows = [np.concatenate([x[row, :before], x[row, 7:8]]) for x in history]
        np.testing.assert_allclose(got[row], exact(query[row], *rows), atol=1e-6)


def test_prompts_go_to_their_slots_and_surplus_ones_nowhere(history):
    keys, values = history
    before = filled(history, SLOTS)
    after = kv_cache.place(before, -keys[:, :4], -values[:, :4], jnp.array([2, 3, 3]))
    query = np.random.default_rng(3).standard_normal((3, 4, 8)).astype(np.float32)
    length = jnp.array([4, 4, 4])
    old, new = (kv_cache.attend(jnp.asarray(query), x, length) for x in (before, after))
    np.testing.assert_array_equal(old[:2], new[:2])
    np.testing.assert_allclose(new[2], exact(query[2], -keys[0, :4], -values[0, :4]), atol=1e-6)


def test_a_long_neighbour_changes_no_bit_and_costs_no_more_than_there_is(history):
    query = jnp.asarray(np.random.default_rng(4).standard_normal((3, 4, 8)), jnp.float32)
    full = filled(history, SLOTS)
    short = kv_cache.attend(query, full, jnp.array([3, 3, 3]))
    beside = kv_cache.attend(query, full, jnp.array([3, 3, SLOTS]))
    np.testing.assert_array_equal(short[:2], beside[:2])
    # Blocks beyond the longest row are not read: nan there would spoil everything it touches.
    spoilt = (full[0], *jax.tree.map(lambda x: x * jnp.nan, full[1:]))
    np.testing.assert_array_equal(kv_cache.attend(query, spoilt, jnp.array([3, 3, 3])), short)
    assert np.isnan(kv_cache.attend(query, spoilt, jnp.array([3, 3, kv_cache.BLOCK + 1]))).any()
