"""Micro-batches by length: every row once, in few shapes, within the budget of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import hardware
from opd_jax.data import microbatches
from opd_jax.types import TeacherRows

pytestmark = pytest.mark.short


@pytest.fixture
def small_batches():
    """The limit below which a batch has two widths, as it is."""


@pytest.fixture(autouse=True)
def quarters(request, monkeypatch):
    """Small shapes stand for large ones: quarters, unless a test is about small batches."""
    if "small_batches" not in request.fixturenames:
        monkeypatch.setattr(microbatches, "_SMALL", 0)


@pytest.mark.parametrize(
    ("longest", "width", "want"),
    [(1, 200, 50), (50, 200, 50), (51, 200, 100), (200, 200, 200), (10, 10, 10), (7, 10, 9),
     (0, 200, 50), (1, 1, 1)],
)  # fmt: skip
def test_a_row_is_as_wide_as_the_least_quarter_that_holds_it(longest, width, want):
    (part,) = microbatches.split(np.array([longest]), width=width, tokens=1000)
    assert (part.width, part.teacher_width) == (want, 0)


@pytest.mark.parametrize(("rows", "want"), [(1, 100), (81, 100), (82, 50)])
@pytest.mark.usefixtures("small_batches")
def test_a_batch_of_at_most_16384_tokens_has_two_widths(rows, want):
    parts = microbatches.split(np.full(rows, 50), width=200, tokens=800)
    assert {part.width for part in parts} == {want}
    widths = {part.width for part in microbatches.shapes(rows, width=200, tokens=800)}
    assert widths == set(range(want, 201, want))
    assert set(microbatches.padded_lengths(np.full(rows, 50), 200)) == {want}


@pytest.mark.parametrize(("rows", "want"), [(113, 2304), (114, 1152)])
def test_a_batch_of_2_to_the_20_tokens_has_eight_widths(rows, want):
    """Rows of 9,216 tokens: 113 of them are 1,041,408 tokens, 114 are 1,050,624 (2^20: 1,048,576)."""
    sizes = {"width": 9216, "tokens": 27_648}
    (first, *_) = microbatches.split(np.full(rows, 1100), **sizes, tile=128)
    assert first.width == want
    shapes = microbatches.shapes(rows, **sizes, tile=128)
    assert [part.width for part in shapes] == list(range(9216, 0, -want))
    assert set(microbatches.padded_lengths(np.full(rows, 1100), 9216, 128)) == {want}
    half = microbatches.padded_lengths(np.full(rows // 2, 1100), 9216, 128, replicas=2)
    assert set(half) == {2304 if rows // 2 * 2 < 114 else 1152}
    length = np.arange(rows) * 80
    for part in microbatches.split(length, **sizes, tile=128):
        assert part.width - want < max(length[part.rows].max(), 1) <= part.width
        assert part.count * part.width <= sizes["tokens"]


def test_the_teachers_rows_count_in_the_budget_and_share_the_quarter():
    # Widths 8 and 24: the first row needs 1 quarter and 3 (18 of 24), the second 2 and 1, the others 1.
    teacher = TeacherRows(np.zeros((5, 24), int), np.array([18, 5, 1, 1, 1]), np.zeros(5, int))
    parts = microbatches.split(np.array([2, 4, 1, 1, 1]), width=8, tokens=24, teacher=teacher)
    assert [(p.rows.tolist(), p.count, p.width, p.teacher_width) for p in parts] == [
        ([0], 1, 6, 18), ([1, 2], 2, 4, 12), ([3, 4], 3, 2, 6),
    ]  # fmt: skip
    taken = microbatches.gather_teacher(teacher, parts[2])
    assert taken.tokens_BT.shape == (3, 6)
    assert taken.length_B.tolist() == [1, 1, 0]


def test_longest_rows_come_first_and_shapes_follow_the_longest_of_each():
    # Width 8, quarters of 2. 16 tokens take 2 rows of width 8, 2 of 6 (even shares: 5 rows in
    # three parts), 4 of 4 -> 3, 8 of 2 -> 5.
    parts = microbatches.split(np.array([3, 8, 2, 5, 1]), width=8, tokens=16)
    assert [(part.rows.tolist(), part.count, part.width) for part in parts] == [
        ([1, 3], 2, 8),
        ([0, 2, 4], 3, 4),
    ]


def test_one_row_at_least():
    parts = microbatches.split(np.array([8, 8]), width=8, tokens=3)
    assert [(part.rows.tolist(), part.count) for part in parts] == [([0], 1), ([1], 1)]


@pytest.mark.parametrize("tokens", [1, 100, 999, 5000, 10**6])
def test_every_row_once_and_few_shapes(tokens):
    generator = np.random.default_rng(tokens)
    shapes = set()
    for _ in range(20):
        length = generator.integers(1, 101, size=64)
        parts = microbatches.split(length, width=100, tokens=tokens)
        assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(64))
        for part in parts:
            assert length[part.rows].max() <= part.width
            assert len(part.rows) <= part.count
            assert part.count * part.width <= max(tokens, part.width)
        shapes |= {(part.count, part.width) for part in parts}
    assert len(shapes) <= 4  # whatever the lengths


def test_gather_and_scatter_are_inverse():
    generator = np.random.default_rng(0)
    length = generator.integers(1, 13, size=7)
    real = np.arange(12)[None] < length[:, None]
    rows = {"a_BT": np.where(real, generator.normal(size=(7, 12)), 0.0), "length_B": length}
    out = np.zeros((7, 12))
    for part in microbatches.split(length, width=12, tokens=25):
        taken = microbatches.gather(rows, part)
        assert jax.tree.map(np.shape, taken) == {
            "a_BT": (part.count, part.width), "length_B": (part.count,)
        }  # fmt: skip
        assert not taken["length_B"][len(part.rows) :].any()
        microbatches.scatter(out, taken["a_BT"], part)
    np.testing.assert_array_equal(out, rows["a_BT"])


def test_padded_lengths_are_the_widths_of_micro_batches():
    length_B = np.arange(0, 12)
    alone = [microbatches.split(np.array([n]), width=11, tokens=11)[0].width for n in length_B]
    assert microbatches.padded_lengths(length_B, 11).tolist() == alone


@pytest.mark.parametrize(
    ("whole", "widths"),
    [
        (9216, [2304, 4608, 6912, 9216]),  # the paper's rows: quarters are 18 tiles
        (5000, [1280, 2560, 3840, 5120]),  # 1,250 is no multiple
        (192, [128, 256, 256, 256]),
        (100, [128, 128, 128, 128]),
    ],
)
def test_widths_on_a_gpu_are_multiples_of_128(whole, widths):
    tile = hardware.tile(gpu=True)
    assert tile == 128
    assert [microbatches.width_of(i, whole, tile) for i in (1, 2, 3, 4)] == widths
    shapes = microbatches.shapes(64, width=whole, tokens=20_000, teacher_width=whole + 7, tile=tile)
    assert {part.width for part in shapes} == set(widths)
    assert all(part.teacher_width % 128 == 0 for part in shapes)
    assert hardware.tile(gpu=False) == 1
    quarter = -(-whole // 4)
    assert [microbatches.width_of(i, whole) for i in (1, 2, 3, 4)] == [
        min(quarter * i, whole) for i in (1, 2, 3, 4)
    ]


def test_rows_are_padded_to_the_tile_and_cut_again():
    """Rows of 10 tokens in tiles of 8: a quarter is one tile, the whole is two, 6 columns are blank."""
    tokens_BT = np.arange(1, 31).reshape(3, 10)
    length_B = np.array([10, 3, 9])
    parts = microbatches.split(length_B, width=10, tokens=32, tile=8)
    assert [(part.rows.tolist(), part.count, part.width) for part in parts] == [
        ([0, 2], 2, 16),
        ([1], 3, 8),
    ]
    wide, length = microbatches.gather((tokens_BT, length_B), parts[0])
    assert wide.shape == (2, 16)
    assert length.tolist() == [10, 9]
    assert (wide[:, :10] == tokens_BT[[0, 2]]).all()
    assert not wide[:, 10:].any()
    out_BT = np.zeros_like(tokens_BT)
    for part in parts:
        microbatches.scatter(out_BT, jnp.asarray(microbatches.gather(tokens_BT, part)), part)
    assert (out_BT[:, :8] == tokens_BT[:, :8]).all()
    assert (out_BT[[0, 2]] == tokens_BT[[0, 2]]).all()
    assert (microbatches.padded_lengths(length_B, 10, 8) == [16, 8, 16]).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_rows_of_any_number_have_the_shapes_of_a_batch(rows):
    """As the rollouts of one of several teachers: more or fewer than an even share of a step."""
    sizes = {"width": 100, "tokens": 400, "replicas": 2}
    listed = {(part.count, part.width) for part in microbatches.shapes(8, **sizes)}
    for seed in range(5):
        length_B = np.random.default_rng(seed).integers(1, 101, rows)
        parts = microbatches.split(length_B, batch=8, **sizes)
        assert {(part.count, part.width) for part in parts} <= listed
        assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(rows))
