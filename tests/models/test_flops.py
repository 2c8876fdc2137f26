"""Operations and bytes of a model small enough to count by hand."""

import math

import jax
import pytest

from opd_jax.models import decoder, flops
from opd_jax.models.flops import Work
from tests.conftest import tiny_config

pytestmark = pytest.mark.short

# D=4, F=6, L=2, N=2, K=1, H=2, V=10. One layer: query 4x4, key and value 4x2 each, output 4x4 = 48,
# MLP 3 x 24 = 72. Two layers: 240. Head: 40.
CONFIG = tiny_config(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=2,
)  # fmt: skip


def test_parameters():
    assert flops.matrix_parameters(CONFIG) == 240
    assert flops.head_parameters(CONFIG) == 40
    # Beside the matrices, a layer has two norms of 4 and biases of 4 + 2 + 2; a last norm of 4.
    assert flops.all_parameters(CONFIG) == 240 + 40 + 2 * (8 + 8) + 4


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"qkv_bias": False}, {"qkv_bias": False, "qk_norm": True}],
)
def test_parameters_are_those_of_the_decoder(changes):
    config = tiny_config(**changes)
    leaves = jax.tree.leaves(decoder.abstract_params(config))
    assert flops.all_parameters(config) == sum(math.prod(leaf.shape) for leaf in leaves)


def test_cache_holds_keys_and_values_of_all_layers():
    assert flops.cache_bytes_per_token(CONFIG, 2) == 2 * 2 * 1 * 2 * 2


def test_decode_step():
    # 3 rows that read 5 positions in all. Weights 280: 2 * 280 * 3; attention 4 L N H = 32 a pair.
    work = flops.decode_step(CONFIG, rows=3, positions=5, itemsize=4)
    assert work == Work(flops=1680 + 160, bytes=4 * 280 + 32 * (5 + 3))


def test_decode_reads_one_position_more_each_step_and_drops_rows_that_ended():
    works = flops.decode(CONFIG, [2, 4], [3, 1], itemsize=4)
    wanted = [(2, 6), (1, 3), (1, 4)]  # rows, positions
    assert works == [flops.decode_step(CONFIG, rows=r, positions=p, itemsize=4) for r, p in wanted]


def test_forward_counts_the_pairs_below_the_diagonal():
    # Rows of 2 and 3: 3 + 6 pairs, 5 tokens.
    assert flops.forward(CONFIG, [2, 3], itemsize=4) == Work(2 * 280 * 5 + 32 * 9, 1120)
    assert flops.forward(CONFIG, [2, 3], itemsize=4, head=False).flops == 2 * 240 * 5 + 32 * 9


def test_prefill_writes_the_cache():
    assert flops.prefill(CONFIG, [2, 3], itemsize=4)[0].bytes == 4 * 240 + 32 * 5


def test_update_is_three_passes_and_the_optimizer():
    works = flops.update(CONFIG, [2, 3], itemsize=2)
    assert works == [Work(3 * (2800 + 288), 3 * 560), Work(0.0, 28 * 316)]


def test_floor_adds_the_slower_of_the_two_of_each_stage():
    works = [Work(100.0, 10.0), Work(10.0, 40.0)]
    # 10 operations and 2 bytes a second: max(10, 5) + max(1, 20).
    assert flops.floor_seconds(works, flops_per_s=10.0, bytes_per_s=2.0) == (30.0, "memory")
    assert flops.floor_seconds(works[:1], flops_per_s=10.0, bytes_per_s=2.0) == (10.0, "compute")
