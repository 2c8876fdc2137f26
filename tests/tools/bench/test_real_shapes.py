"""Checks at real shapes, here at small ones, and that they see what they are for."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import attention, kv_cache
from opd_jax.tools.bench import h200, real_shapes

MODEL = h200.TOY.student


@pytest.mark.short
def test_lengths_lie_around_the_borders_of_tiles():
    assert real_shapes.lengths(200) == [1, 2, 63, 64, 65, 127, 128, 129, 199, 200]
    assert real_shapes.lengths(3) == [1, 2, 3]


def test_attention_in_bfloat16_is_close_to_float32():
    rows = real_shapes.causal(MODEL, width=70, most_rows=5)
    assert [row.name.split()[-1] for row in rows] == ["output", "dQ", "dK", "dV"]
    assert rows[0].shape == "5 x 70, 2 queries a key"
    assert all(row.status == "ok" and 1e-4 < row.error < real_shapes.SHARE for row in rows)


@pytest.mark.parametrize("what", ["a nan behind the rows", "a key too many"])
def test_a_kernel_that_is_wrong_fails(monkeypatch, what):
    right = attention.attend_causal

    def wrong(query, key, value, length_B):
        out = right(query, key, value, length_B)
        if what == "a nan behind the rows":
            beyond = jnp.arange(out.shape[1])[None] >= length_B[:, None]
            return jnp.where(beyond[..., None, None], jnp.nan, out)
        return right(jnp.roll(query, 1, axis=1), key, value, length_B)

    monkeypatch.setattr(attention, "attend_causal", wrong)
    rows = real_shapes.causal(MODEL, width=70, most_rows=5)
    assert rows[0].status == "failed"


def test_a_decode_step_with_few_live_rows(monkeypatch):
    (row,) = real_shapes.cached(MODEL, rows=6, cache=140, live=3)
    assert row.shape == "6 x 140, 3 of them live"
    assert row.status == "ok"
    right = kv_cache.attend
    monkeypatch.setattr(kv_cache, "attend", lambda q, cache, n: right(q, cache, n + (n > 1) * -1))
    assert real_shapes.cached(MODEL, rows=6, cache=140, live=3)[0].status == "failed"


def test_log_probs_of_the_sampler_and_of_the_scorer():
    (row,) = real_shapes.sampled(MODEL, rows=2, prompt=3, new=4)
    assert row.status == "ok"
    assert "nats, mean" in row.note


@pytest.mark.short
def test_arrays_of_zeros_have_an_absolute_deviation():
    zero = np.zeros(3)
    assert real_shapes._share(zero, zero) == 0
    assert real_shapes._share(np.array([3.0, 4.0, 0.0]), zero) == 5


@pytest.mark.short
def test_the_cases_of_the_suite_have_names_of_their_own():
    for sizes in (h200.TOY, h200.Sizes()):
        names = [case.name for case in h200._real_shapes(sizes)]
        assert len(set(names)) == len(names)
        assert all(name.startswith("check: ") for name in names)
