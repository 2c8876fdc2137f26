"""The teacher's distribution on golden solutions: against formulas in float64, SFT, and rollouts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from opd_jax import losses, train
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.training import batch, objective
from opd_jax.training.terms import Terms, default_terms
from opd_jax.types import Ends, Frozen, GoldenRows, Rollout, Scores, Support
from tests.conftest import distance, noisy_params, random_rows, tiny_config
from tests.support import calls
from tests.support.lanes import slow
from tests.support.small_run import lines, small, without_times

CONFIG = tiny_config(num_layers=1, tie_embeddings=False)
VOCABULARY, K, PROMPT = CONFIG.vocab_size, 5, 3
STUDENT, TEACHER = noisy_params(CONFIG, seed=0), noisy_params(CONFIG, seed=1)
FROZEN = Frozen(teacher=decoder.head_alone(TEACHER))
SOFT = default_terms(pg_weight=0.0, golden_divergence=1.0)
SFT = default_terms(pg_weight=0.0, lambda_gold=1.0)
LOSS = {"token_chunk": 7, "remat": "none"}


def rows_of(seed: int) -> Rollout:
    """4 rows of up to 10 tokens, whose first 3 are the prompt."""
    tokens_BT, length_B = (np.asarray(x) for x in random_rows(CONFIG, 4, 10, seed))
    prompts = [row[:PROMPT].tolist() for row in tokens_BT]
    solutions = [
        row[PROMPT:length].tolist() for row, length in zip(tokens_BT, length_B, strict=True)
    ]
    return batch.as_rollout(prompts, solutions, width=10)


GOLDEN, OWN = rows_of(0), rows_of(5)  # golden solutions, and rollouts with other prefixes


def weigh(mask_BT: np.ndarray) -> np.ndarray:
    return np.asarray(losses.token_weights(mask_BT, "token"))


@functools.cache
def scored(own: bool, support: str | None) -> Scores:
    given = OWN if own else GOLDEN
    return calls.score(
        STUDENT, CONFIG, TEACHER, CONFIG, given.tokens_BT, given.length_B,
        vocabulary=VOCABULARY, top_k=3, token_chunk=7, microbatch_tokens=20,
        support=support and (support, K), keep_hidden=support is None,
    )  # fmt: skip


def golden_rows(terms: Terms, mask_BT: np.ndarray | None = None) -> GoldenRows:
    support = None if terms.golden_support == "full" else terms.golden_support
    mask_BT = GOLDEN.response_mask_BT if mask_BT is None else mask_BT
    return batch.golden_rows(GOLDEN, weigh=weigh, scores=scored(False, support), scored_BT=mask_BT)


def graded(loss, terms: Terms, rows, weights=None, params=STUDENT):
    """((total, parts), gradient) of a loss; every term has weight 1 unless `weights` are given."""
    weights = weights or dict.fromkeys(terms.weights, 1.0)
    return gradient_of(loss)(params, FROZEN, rows, weights)


@functools.cache
def gradient_of(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def made(make, terms: Terms):
    return make(terms, CONFIG, **LOSS)


def golden(terms: Terms, rows: GoldenRows, **changes):
    return graded(made(objective.make_golden_loss, terms), terms, rows, **changes)


def rolled(terms: Terms, given: Rollout, scores: Scores):
    mask_BT = given.response_mask_BT
    advantage_BT = np.zeros(mask_BT.shape, np.float32)
    rows = batch.rollout_rows(given, scores, mask_BT, advantage_BT, terms, weigh=weigh)
    return graded(made(objective.make_rollout_loss, terms), terms, rows)


# Prefix source x direction (2605.16826).


def published(direction: str, given: Rollout) -> np.ndarray:
    """The gradient in the student's output matrix [V, D], in float64.

    grad KL(q || p) = -E_{v~q} grad log p(v), and
    grad KL(p || q) = E_{v~p} [(log p(v) - log q(v)) grad log p(v)],
    where grad log p(v) = (e_v - p) h^T and h is the state that predicts the token.
    """
    total = np.zeros((VOCABULARY, CONFIG.hidden_size))
    weight_BT = np.float64(weigh(given.response_mask_BT))
    states, heads = {}, {}
    for name, params in (("p", STUDENT), ("q", TEACHER)):
        tokens, length = jnp.asarray(given.tokens_BT), jnp.asarray(given.length_B)
        states[name] = np.float64(calls.hidden_states(params, CONFIG, tokens, length))
        heads[name] = np.float64(decoder.head(params))
    for b, t in np.argwhere(given.response_mask_BT):
        h = states["p"][b, t - 1]
        p, q = (
            scipy.special.log_softmax(heads[name] @ states[name][b, t - 1]) for name in ("p", "q")
        )
        by_v = -np.exp(q) if direction == "forward" else np.exp(p) * (p - q)
        of_logits = by_v - by_v.sum() * np.exp(p)  # sum_v by_v (e_v - p)
        total += weight_BT[b, t] * np.outer(of_logits, h)
    return total


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("source", ["golden", "rollouts"])
def test_the_four_cells_have_the_published_gradients(source, direction):
    if source == "golden":  # soft-label KD, offline RL
        terms = dataclasses.replace(SOFT, golden_direction=direction)
        _, gradient = golden(terms, golden_rows(terms))
        want = published(direction, GOLDEN)
    else:  # DAgger, OPD
        terms = default_terms(pg_weight=0.0, divergence_weight=1.0, direction=direction)
        _, gradient = rolled(terms, OWN, scored(True, None))
        want = published(direction, OWN)
    np.testing.assert_allclose(gradient["head"]["kernel"], want, atol=1e-6)
    assert np.abs(want).max() > 1e-2


@pytest.mark.parametrize(
    ("support", "direction", "form"),
    [
        ("full", "forward", "raw"),
        *slow(
            ("teacher", "reverse", "tail"),
            ("full", "jsd", "raw"),
            ("student", "reverse", "stop_gradient"),
            ("teacher", "forward", "teacher_renormalised"),
            ("union", "mixture", "renormalised"),
            ("intersection", "skewed_reverse", "raw"),
        ),
    ],
)
def test_golden_rows_are_scored_as_rollouts_are(support, direction, form):
    """The same rows as rollouts have the same divergence, and the same gradient."""
    numbers = {"support": support, "direction": direction, "form": form, "top_k": K}
    shared = {"pg_weight": 0.0, "jsd_beta": 0.25, "reverse_share": 0.3}
    terms = default_terms(
        **shared, golden_divergence=1.0, **{f"golden_{k}": v for k, v in numbers.items()}
    )
    (_, parts), gradient = golden(terms, golden_rows(terms))
    on_rollouts = default_terms(**shared, divergence_weight=1.0, **numbers)
    scores = scored(False, None if support == "full" else support)
    (_, expected), expected_gradient = rolled(on_rollouts, GOLDEN, scores)
    assert float(parts["golden_divergence"]) == pytest.approx(
        float(expected["divergence"]), abs=1e-6
    )
    assert distance(gradient, expected_gradient) < 1e-6
    assert abs(float(expected["divergence"])) > 1e-4


def certain_rows() -> GoldenRows:
    """A teacher that gives the golden token probability 1: its top-1 set is that token."""
    tokens_BT = GOLDEN.tokens_BT
    zeros_BT1 = np.zeros((*tokens_BT.shape, 1), np.float32)
    support = Support(
        ids_BTX=tokens_BT[..., None],
        student_BTX=zeros_BT1,
        teacher_BTX=zeros_BT1,
        teacher_rest_BT=np.full(tokens_BT.shape, -np.inf, np.float32),
    )
    return golden_rows(SOFT).replace(support=support, teacher_hidden_BTD=None)


def test_a_certain_teacher_is_the_supervised_term():
    """Forward KL is cross-entropy minus the teacher's entropy, which is 0 here."""
    rows = certain_rows()
    terms = dataclasses.replace(SOFT, lambda_gold=1.0, golden_support="teacher", golden_top_k=1)
    off = dict.fromkeys(terms.weights, 0.0)
    (soft, parts), gradient = golden(terms, rows, weights=off | {"golden_divergence": 1.0})
    (hard, _), expected = golden(terms, rows, weights=off | {"sft": 1.0})
    assert float(parts["sft"]) == float(hard) > 1.0
    assert float(soft) == pytest.approx(float(hard), abs=1e-6)
    assert distance(gradient, expected) < 1e-6


def uniform(params: decoder.Params) -> decoder.Params:
    return params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}


@pytest.mark.parametrize(("direction", "value"), [("forward", 0.19274), ("reverse", 0.22314)])
def test_golden_divergence_by_hand(direction, value):
    """p = (.5, .5), q = (.8, .2) at every token: two ids, and a student whose logits are 0."""
    shape = (*GOLDEN.tokens_BT.shape, 2)
    q_BTX = np.broadcast_to(np.log(np.float32([0.8, 0.2])), shape)
    ids_BTX = np.broadcast_to(np.arange(2, dtype=np.int32), shape)
    support = Support(ids_BTX, q_BTX, q_BTX, np.full(shape[:2], -np.inf, np.float32))
    terms = dataclasses.replace(SOFT, golden_support="teacher", golden_direction=direction)
    rows = golden_rows(SOFT).replace(
        tokens_BT=GOLDEN.tokens_BT % 2, support=support, teacher_hidden_BTD=None
    )
    loss = objective.make_golden_loss(terms, CONFIG, events=Events(vocabulary=2), **LOSS)
    (total, _), _ = graded(loss, terms, rows, params=uniform(STUDENT))
    assert float(total) == pytest.approx(value, abs=1e-5)


def test_tokens_that_are_not_compared_count_for_nothing():
    """A row without comparable tokens, whatever its scores are, and one token of another row."""
    terms = dataclasses.replace(SOFT, lambda_gold=1.0, golden_support="teacher", golden_top_k=K)
    mask_BT = GOLDEN.response_mask_BT.copy()
    mask_BT[1] = mask_BT[0, PROMPT] = False
    rows = golden_rows(terms, mask_BT)
    spoilt_BTX = rows.support.teacher_BTX.copy()
    spoilt_BTX[1], spoilt_BTX[0, PROMPT] = np.nan, np.nan
    spoilt = rows.replace(support=rows.support.replace(teacher_BTX=spoilt_BTX))
    (_, parts), gradient = golden(terms, spoilt)
    (_, expected), expected_gradient = golden(terms, rows)
    assert float(parts["golden_divergence"]) == float(expected["golden_divergence"])
    jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)
    # The mean is over the tokens that count; the supervised term keeps all of them.
    everything = golden_rows(terms)
    (_, whole), _ = golden(terms, everything)
    assert float(parts["sft"]) == float(whole["sft"])
    one = batch.golden_rows(
        jax.tree.map(lambda x: x[[0, 2, 3]], GOLDEN),
        weigh=weigh,
        scores=jax.tree.map(lambda x: x[[0, 2, 3]], scored(False, "teacher")),
        scored_BT=mask_BT[[0, 2, 3]],
    )
    (_, without), _ = golden(terms, one)
    np.testing.assert_allclose(parts["golden_divergence"], without["golden_divergence"], rtol=1e-6)


def test_at_weight_0_the_supervised_update_is_the_same_to_the_bit():
    plain = batch.golden_rows(GOLDEN, weigh=weigh)
    (total, parts), gradient = golden(SFT, plain)
    assert set(parts) == {"sft"}
    assert [x for x in jax.tree.leaves(plain) if x.ndim > 2] == []
    both = dataclasses.replace(SFT, golden_divergence=1.0)
    off = dict.fromkeys(both.weights, 0.0) | {"sft": 1.0}
    (same, _), same_gradient = golden(both, golden_rows(both), weights=off)
    assert float(total) == float(same)
    jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)


@pytest.mark.slow
def test_both_terms_add_up_where_ends_are_events():
    """The divergence compares the end of a response; the supervised term teaches the very token."""
    ends = Ends(id=50, student=(7, 50), teacher=(3, 50))
    scored_V = np.ones(90, bool)
    scored_V[[7, 3]] = False
    events = Events(vocabulary=90, scored_V=scored_V, ends=ends)
    tokens_BT = GOLDEN.tokens_BT % 90
    tokens_BT[np.isin(tokens_BT, (3, 7, 50))] = 20
    last = np.arange(4), GOLDEN.length_B - 1
    tokens_BT[last] = 7  # not the id that stands for the event
    given = GOLDEN.replace(tokens_BT=tokens_BT)
    scores = calls.score(
        STUDENT, CONFIG, TEACHER, CONFIG, tokens_BT, given.length_B, vocabulary=90, top_k=3,
        token_chunk=7, microbatch_tokens=20, events=events, keep_hidden=True,
    )  # fmt: skip
    rows = batch.golden_rows(given, weigh=weigh, scores=scores, scored_BT=given.response_mask_BT)
    both = dataclasses.replace(SOFT, lambda_gold=1.0)
    results = {}
    for name, terms in (("both", both), ("soft", SOFT), ("sft", SFT)):
        loss = objective.make_golden_loss(terms, CONFIG, events=events, **LOSS)
        results[name] = graded(loss, terms, rows)
    (_, parts), gradient = results["both"]
    for name, term in (("soft", "golden_divergence"), ("sft", "sft")):
        np.testing.assert_allclose(parts[term], results[name][0][1][term], rtol=1e-6)
    summed = jax.tree.map(jnp.add, results["soft"][1], results["sft"][1])
    assert distance(gradient, summed) < 1e-6
    on_rollouts = default_terms(pg_weight=0.0, divergence_weight=1.0, direction="forward")
    rows = batch.rollout_rows(
        given, scores, given.response_mask_BT, np.zeros(tokens_BT.shape, np.float32), on_rollouts,
        weigh=weigh,
    )  # fmt: skip
    loss = objective.make_rollout_loss(on_rollouts, CONFIG, events=events, **LOSS)
    (_, expected), _ = graded(loss, on_rollouts, rows)
    np.testing.assert_allclose(parts["golden_divergence"], expected["divergence"], rtol=1e-6)


def test_minibatches_weigh_the_tokens_of_both_terms_anew():
    mask_BT = GOLDEN.response_mask_BT.copy()
    mask_BT[0] = False
    rows = golden_rows(SOFT, mask_BT)
    half = batch.share(rows, 0, 2, weigh=weigh)
    np.testing.assert_array_equal(half.weight_BT, weigh(GOLDEN.response_mask_BT[:2]))
    np.testing.assert_array_equal(half.divergence_weight_BT, weigh(mask_BT[:2]))
    np.testing.assert_array_equal(half.teacher_hidden_BTD, rows.teacher_hidden_BTD[:2])
    assert float(half.divergence_weight_BT.sum()) == pytest.approx(1.0)


# The fall of the weight.


def test_the_weight_falls_along_a_cosine():
    """w = 2 over 4 steps: 2, 1 + cos(pi/4), 1, 1 - cos(pi/4), 0, 0."""
    terms = dataclasses.replace(SOFT, golden_divergence=2.0, golden_steps=4)
    got = [terms.weights_at(step)["golden_divergence"] for step in range(1, 7)]
    half = math.sqrt(0.5)
    assert got == pytest.approx([2.0, 1 + half, 1.0, 1 - half, 0.0, 0.0], abs=1e-12)
    assert got[4] == got[5] == 0.0  # exactly: then the teacher is not asked
    assert dataclasses.replace(terms, golden_steps=0).weights_at(100) == terms.weights


def test_what_a_divergence_on_golden_solutions_needs():
    assert SOFT.needs_teacher
    assert SOFT.needs_golden
    assert not SOFT.needs_rollouts
    assert not SOFT.teaches_rollouts
    assert SOFT.golden_over_vocabulary
    assert SOFT.golden_scored_support is None
    some = dataclasses.replace(SOFT, golden_support="union", golden_top_k=7)
    assert some.golden_scored_support == ("union", 7)
    assert not some.reads_head
    assert not SFT.needs_teacher
    assert dataclasses.replace(SFT, golden_support="union").golden_scored_support is None


# Whole runs.


def soft_run(folders, **changes):
    config = small(folders, "opd")
    config.loss.update({"golden_divergence": 1.0} | changes)
    config.eval.data = ""
    return config


def same_state(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"golden_support": "teacher", "golden_top_k": 4, "golden_steps": 3, "lambda_gold": 0.5},
        {"golden_steps": 3, "lambda_gold": 0.5, "pg_weight": 0.0, "golden_direction": "reverse"},
    ],
    ids=["beside rollouts", "alone, over the vocabulary"],
)
def test_a_run_whose_weight_falls_to_0_resumes_to_the_same_bits(folders, tmp_path, changes):
    straight = soft_run(folders, **changes)
    whole = train.run(straight, str(tmp_path / "whole"), command=[])
    rows = lines(tmp_path / "whole", "metrics.jsonl")
    steps = [row for row in rows if row["step"]]
    assert all("loss/golden_divergence" in row for row in steps)
    assert ["time/score_golden_s" in row for row in steps] == [True, True, True, False]
    assert [row["loss/golden_divergence"] > 0 for row in steps] == [True, True, True, False]
    cut = soft_run(folders, **changes)
    cut.steps = 2
    train.run(cut, str(tmp_path / "cut"), command=[])
    cut.steps = 4
    again = train.run(cut, str(tmp_path / "cut"), command=[])
    same_state(whole, again)
    assert without_times(lines(tmp_path / "cut", "metrics.jsonl")) == without_times(rows)


@pytest.mark.slow
def test_micro_batches_and_the_teachers_own_prompts(folders, tmp_path):
    """Fewer rows at a time change nothing but rounding; the teacher reads another prompt."""
    values = {}
    for name, tokens, prompt in (
        ("whole", 2560, "same"), ("parts", 320, "same"), ("asked", 320, "Think. {problem}"),
    ):  # fmt: skip
        config = soft_run(folders, pg_weight=0.0)
        config.steps, config.optim.microbatch_tokens = 1, tokens
        config.data.teacher_prompt_template = prompt
        config.teacher.max_position = 200  # its prompts are longer
        config.data.size = 64  # without a solution that is longer than a response may be
        train.run(config, str(tmp_path / name), command=[])
        values[name] = lines(tmp_path / name, "metrics.jsonl")[-1]["loss/golden_divergence"]
    assert values["parts"] == pytest.approx(values["whole"], rel=1e-5)
    assert values["asked"] != pytest.approx(values["whole"], rel=1e-4)  # random models
