"""A divergence by spans is the same on any mesh. Needs eight devices: test_mesh.py starts it so."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import spans
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.sharding.mesh import ONE
from opd_jax.training import objective, update
from opd_jax.training.span_objective import SpanTerm
from opd_jax.training.terms import default_terms
from opd_jax.types import Frozen, SpanAnchors
from tests.conftest import distance, noisy_params
from tests.sharding.eight_devices import CONFIG, EVENTS, ROWS, B, T, make, on, params

__all__ = ["params"]  # a fixture
OTHER = 61  # ids of the teacher


@pytest.mark.parametrize(
    ("compared", "mesh"),
    [
        ("candidates", "2x2x2"),
        pytest.param("matched", "2x2x2", marks=pytest.mark.slow),
        pytest.param("sorted", "2x4x1 sharded", marks=pytest.mark.slow),
    ],
)
def test_a_divergence_by_spans_is_the_same_on_a_mesh(params, compared, mesh):
    """Spans of two tokens, of which the teacher has one; its vocabulary is another, its head sharded."""
    generator = np.random.default_rng(7)
    span_BT = np.where(ROWS.weight_BT > 0, np.arange(T)[None] // 2, -1).astype(np.int32)
    size_BT = np.ones((B, T), np.float32) + (span_BT == np.roll(span_BT, 1, axis=1))
    anchors = SpanAnchors(
        span_BT=span_BT,
        anchor_BT=spans.anchors(span_BT, last=compared != "candidates"),
        size_BT=np.where(np.arange(T)[None] % 2 == 0, np.roll(size_BT, -1, axis=1), size_BT),
        teacher_token_BT=generator.integers(0, OTHER, (B, T), np.int32),
        teacher_rest_BT=np.zeros((B, T), np.float32),
        teacher_size_BT=np.ones((B, T), np.float32),
    )
    noise = generator.normal(size=(B, T, CONFIG.hidden_size)).astype(np.float32)
    given = ROWS.replace(spans=anchors, teacher_hidden_BTD=noise)
    terms = default_terms(pg_weight=0.0, divergence_weight=1.0, span_events=compared)
    ids = np.arange(20, 50, dtype=np.int32)
    term = SpanTerm(compared, terms.on_rollouts, np.stack([ids, ids]), Events(OTHER), OTHER)
    loss = objective.make_rollout_loss(
        terms, CONFIG, token_chunk=7, remat="none", events=EVENTS.replace(vocabulary=90), span_term=term
    )  # fmt: skip
    results = []
    for devices in (ONE, make(mesh)):
        accumulate = update.make_accumulate(
            loss, None, microbatch_tokens=2 * T, dtype=jnp.float32, mesh=devices
        )
        own, teacher = params, noisy_params(dataclasses.replace(CONFIG, vocab_size=OTHER), seed=2)
        if devices is not ONE:
            own, teacher = on(devices, own), on(devices, teacher)
        frozen = Frozen(teacher=decoder.head_alone(teacher))
        results.append(accumulate(own, frozen, given, None, terms.weights))
    (want, wanted), (got, sums) = results
    assert distance(got, want) < 1e-5
    assert distance(sums, wanted) < 1e-5
    assert float(wanted["divergence"]) > 1e-3
