"""Methods compiled for an H200: no array [batch, time, vocabulary], no pass of a model beyond OPD's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import methods
from opd_jax.models import decoder
from opd_jax.scoring.score import Models, ScoreSpec, score_part
from opd_jax.training import objective, update
from opd_jax.training.terms import ON_ROLLOUTS, Terms, default_terms
from opd_jax.types import Frozen, RolloutRows, Support
from tests.h200.conftest import QWEN_1_5B
from tests.h200.test_update import BACKWARD, FORWARD

ROWS, WIDTH, CHUNK, K = 2, 8192, 1024, 16
VOCABULARY = QWEN_1_5B.vocab_size
ZEROS_BT, ZEROS_B = np.zeros((ROWS, WIDTH), np.float32), np.zeros(ROWS, np.int32)
SHAPE = re.compile(r"(?:f32|bf16|f16|s32|u32|pred|f64|s64)\[([\d,]+)\]")


def terms_of(name: str) -> Terms:
    """The loss of a published method, with the defaults elsewhere."""
    fields = methods.METHODS[name].numbers
    loss = {k.removeprefix("loss."): v for k, v in fields.items() if k.startswith("loss.")}
    return default_terms(**{k: v for k, v in loss.items() if k in Terms.__dataclass_fields__})


def figures(compiled) -> tuple[int, int, float]:
    """Calls of attention, forward and backward, and GiB of temporaries; sizes of arrays are checked.

    An array with a vocabulary axis is an output matrix or a chunk's logits, and no array is as large as
    half of tokens times vocabulary.
    """
    text = compiled.as_text()
    shapes = {tuple(map(int, x.split(","))) for x in SHAPE.findall(text)}
    beside = {int(np.prod(x)) // VOCABULARY for x in shapes if VOCABULARY in x}
    assert max(beside) <= max(CHUNK, QWEN_1_5B.hidden_size)
    assert CHUNK in beside  # it really is the loss
    assert max(int(np.prod(x)) for x in shapes) < ROWS * WIDTH * VOCABULARY / 2
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
    return text.count(FORWARD), text.count(BACKWARD), temporary


def rows_of(terms: Terms) -> RolloutRows:
    support = on_support = None
    if terms.scored_support is not None:
        over_ids = np.zeros((*ZEROS_BT.shape, terms.top_k), np.float32)
        support = Support(over_ids.astype(np.int32), over_ids, over_ids, ZEROS_BT)
        on_support = over_ids if terms.on_support else None
    hidden = None
    if terms.over_vocabulary:
        hidden = jax.ShapeDtypeStruct((ROWS, WIDTH, QWEN_1_5B.hidden_size), jnp.bfloat16)
    return RolloutRows(
        tokens_BT=ZEROS_BT.astype(np.int32), length_B=ZEROS_B, weight_BT=ZEROS_BT,
        advantage_BT=ZEROS_BT, sampler_logprob_BT=ZEROS_BT, teacher_hidden_BTD=hidden,
        support=support, support_advantage_BTX=on_support,
        divergence_gate_BT=ZEROS_BT if terms.gated else None,
    )  # fmt: skip


def update_of(name: str, on_h200) -> tuple[int, int, float]:
    """A micro-batch's pass of the update of a method, for 16,384 tokens."""
    terms = terms_of(name)
    loss = objective.make_rollout_loss(terms, QWEN_1_5B, token_chunk=CHUNK, remat="attention")
    params = on_h200(decoder.abstract_params(QWEN_1_5B))
    head = None
    if terms.over_vocabulary:
        head = decoder.head_alone(
            jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), params)
        )
    weights = {name: np.float32(1) for name in ON_ROLLOUTS}
    arguments = (params, on_h200(Frozen(teacher=head)), on_h200(rows_of(terms)), on_h200(weights))
    return figures(update.make_add(loss, jnp.bfloat16).lower(*arguments, params).compile())


@pytest.fixture(scope="module")
def plain(on_h200):
    """The figures of plain OPD, computed once."""
    return functools.cache(lambda: update_of("opd", on_h200))


@pytest.mark.parametrize("name", ["eopd", "tropd", "support_opd", "mixed_kl"])
def test_the_update_of_a_method(on_h200, fused_attention, plain, name):
    forward, backward, temporary = update_of(name, on_h200)
    usual = plain()[2]
    print(f"{name}: temporaries {temporary:.2f} GiB, OPD {usual:.2f} GiB")
    assert (forward, backward) == (1, 1)  # in the bodies of the two scans over layers
    chunk = 4 * CHUNK * VOCABULARY / 2**30
    assert temporary < usual + 3.5 * chunk


def scores_of(spec: ScoreSpec, on_h200, *, reference: bool) -> tuple[int, int, float]:
    """One micro-batch of scoring with student, teacher and possibly the reference, all of this size."""
    params = decoder.abstract_params(QWEN_1_5B)
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), params)
    model = on_h200(decoder.Model(QWEN_1_5B, params))
    rows = on_h200((ZEROS_BT.astype(np.int32), ZEROS_B, ZEROS_B))
    three = Models(model, model, model if reference else None)
    return figures(score_part.lower(three, *rows, None, spec).compile())


@pytest.mark.parametrize(
    ("more", "reference"),
    [
        ({}, False),
        ({}, True),  # extrapolation
        ({"support": ("teacher", 64)}, False),  # TrOPD
        ({"support": ("union", 16), "statistic": ("teacher_mass", 16)}, False),  # with TA-OPD's
    ],
    ids=["opd", "reference", "support", "support and statistic"],
)
def test_scoring_for_a_method(on_h200, fused_attention, more, reference):
    spec = ScoreSpec(K, CHUNK, **more)
    forward, backward, temporary = scores_of(spec, on_h200, reference=reference)
    print(f"{more} {reference}: temporaries {temporary:.2f} GiB")
    assert (forward, backward) == (3 if reference else 2, 0)  # one pass of each model
