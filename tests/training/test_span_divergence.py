"""The divergence by spans in the update: chunks against whole logits, one tokenizer, and whole runs."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models, scoring, train
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.losses import span_divergence, spans
from opd_jax.losses.span_divergence import SPAN_EVENTS, Side
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.training import batch, model_limits, span_scores
from opd_jax.training.make_setup import make_setup
from opd_jax.training.span_objective import SpanTerm, span_inputs
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.terms import Divergence, default_terms, make_terms
from opd_jax.types import Frozen, RolloutRows, Scores, SpanScores, TextRows
from tests.support import calls
from tests.support.lanes import slow
from tests.support.small_run import lines, small, without_times
from tests.training.test_span_scores import golden_rollout, two_tokenizers

# Two rows: spans of 1, 2 and 3 tokens of the student, of which the teacher has 1, 3 and 1; and of 1 and 1.
SPAN = np.array([[-1, 0, 1, 1, 2, 2, 2, -1], [-1, -1, 0, 1, -1, -1, -1, -1]], np.int32)
TEACHER_SPAN = np.array([[-1, -1, 0, 1, 1, 1, 2], [-1, 0, 1, -1, -1, -1, -1]], np.int32)
V, U, D = 9, 7, 4
SHARED = np.array([[0, 2, 5, 8], [3, 0, 6, 1]], np.int32)
JSD = Divergence("jsd", "raw", 0.3)
TERMS = {
    name: SpanTerm(name, JSD if name == "matched" else Divergence("reverse", "raw", None), SHARED,
                   Events(vocabulary=U), U)
    for name in SPAN_EVENTS
}  # fmt: skip


def toy(seed: int = 0):
    """Tokens of both models, output matrices and hidden states."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, V, SPAN.shape), generator.integers(0, U, TEACHER_SPAN.shape)
    heads = generator.normal(size=(V, D)), generator.normal(size=(U, D))
    hidden = (
        generator.normal(size=(*SPAN.shape, D)),
        generator.normal(size=(*TEACHER_SPAN.shape, D)),
    )
    return tokens, heads, hidden


def whole_logprob(head, hidden):
    """log p(. | prefix) at [b, t] of the token at t, of whole logits; 0 at t = 0."""
    every = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, head), axis=-1)
    return jnp.concatenate([jnp.zeros_like(every[:, :1]), every[:, :-1]], axis=1)


def by_hand(name: str, tokens, student, teacher, weight) -> jax.Array:
    """sum over spans of weight * D from whole log-probs of both models [B, T, V], one span after another."""
    total = jnp.zeros(())
    for row in range(len(SPAN)):
        for span in range(SPAN[row].max() + 1):
            sides = []
            places = [np.flatnonzero(of[row] == span) for of in (SPAN, TEACHER_SPAN)]
            for log, ids, at, shared in zip(
                (student, teacher), tokens, places, SHARED, strict=True
            ):
                anchor = at[0] if name == "candidates" else at[-1]
                rest = sum((log[row, t, ids[row, t]] for t in at if t != anchor), jnp.zeros(()))
                sides.append(Side(
                    log[row, anchor][None], jnp.asarray(ids[row, [anchor]]), rest[None],
                    jnp.array([float(len(at))]), jnp.asarray(shared),
                ))  # fmt: skip
            joint = jnp.array([max(map(len, places)) > 1])
            if name == "sorted":
                found = span_divergence.sorted_divergence(*sides)
            elif name == "candidates":
                found = span_divergence.candidate_divergence(*sides, joint, direction="reverse")
            else:
                found = span_divergence.matched_divergence(
                    *sides, joint, weight=4 / U, direction="jsd", share=0.3
                )
            total += weight[row, np.flatnonzero(SPAN[row] == span)[0]] * found[0]
    return total


def rows_of(name: str, tokens, heads, hidden, weight) -> tuple[RolloutRows, jax.Array]:
    """Rows as the step makes them, and the teacher's hidden states at the student's places."""
    teacher = whole_logprob(jnp.asarray(heads[1]), jnp.asarray(hidden[1]))
    at = jnp.take_along_axis(teacher, jnp.asarray(tokens[1])[..., None], axis=-1)[..., 0]
    zeros, empty = np.zeros(SPAN.shape, np.float32), np.zeros(2, np.int32)
    scores = span_scores.joined(
        Scores(zeros, zeros),
        Scores(np.asarray(at), np.asarray(at), teacher_hidden_BTD=np.asarray(hidden[1])),
        TextRows(tokens[1], empty, empty, TEACHER_SPAN, SPAN, np.zeros(SPAN.shape, np.int32)),
        compared=name,
    )
    anchors = jax.tree.map(jnp.asarray, scores.spans.anchors)
    rows = RolloutRows(
        jnp.asarray(tokens[0]), jnp.array([7, 4]), jnp.asarray(weight), zeros, zeros, spans=anchors
    )
    return rows, jnp.asarray(scores.teacher_hidden_BTD)


@pytest.mark.parametrize("token_chunk", [3, 100])
@pytest.mark.parametrize("name", SPAN_EVENTS)
def test_chunks_have_value_and_gradient_of_whole_logits(name, token_chunk):
    """Spans that lie across chunks; the second row's last span does not count."""
    with jax.enable_x64(True):
        tokens, heads, hidden = toy()
        weight = np.where(SPAN >= 0, 0.1 + 0.2 * np.arange(2)[:, None], 0.0)
        weight[1, 3] = 0.0
        rows, teacher_hidden = rows_of(name, tokens, heads, hidden, weight)
        term = TERMS[name]

        def chunked(head, states):
            student = scoring.Readout(head, states)
            teacher = scoring.Readout(
                jnp.asarray(heads[1]), teacher_hidden, events=term.teacher_events
            )
            more = {"token_chunk": token_chunk, "events": Events(vocabulary=V)}
            inputs = span_inputs(term, student, teacher, rows, **more)

            def parts(student_CV, teacher_CU, *, token_C, **at):
                logprob_C = scoring.take(student_CV, token_C)
                return {
                    "divergence": term.part(
                        student_CV, teacher_CU, logprob_C, token_C=token_C, at=at
                    )
                }

            return scoring.sum_tokens(
                parts,
                [student, teacher],
                rows.tokens_BT,
                inputs,
                rows.weight_BT,
                {"divergence": 1.0},
                **more,
            )[0]

        def whole(head, states):
            teacher = whole_logprob(jnp.asarray(heads[1]), jnp.asarray(hidden[1]))
            return by_hand(name, tokens, whole_logprob(head, states), teacher, weight)

        at = jnp.asarray(heads[0]), jnp.asarray(hidden[0])
        got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*at) for f in (chunked, whole))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        assert got[0] > 0.01
        for mine, theirs in zip(got[1], want[1], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-6)
            assert np.abs(theirs).max() > 1e-3


def learned(config) -> tuple[dict[str, jax.Array], jax.Array, np.ndarray]:
    """Parts of the loss on golden solutions taken as rollouts, its gradient as one vector, and the mask."""
    setup = make_setup(config)
    rollout, prompts = golden_rollout(setup)
    teacher_rows = None
    if setup.reader is not None:
        teacher_rows = span_scores.text_rows(
            rollout, prompts, setup.reader, width=setup.teacher_width, response=setup.teacher_response
        )  # fmt: skip
    student, teacher = (models.load(config[role].path)[1] for role in ("student", "teacher"))
    functions = make_step_functions(setup.spec)
    scores = functions.score(student, teacher, rollout, teacher_rows)
    mask_BT = batch.scored_mask(rollout, setup.alignment.counted)
    mask_BT[1, rollout.length_B[1] - 1] = (
        False  # a cut response: spans do not compare its last token
    )
    terms = make_terms(config)
    if scores.spans is not None:
        mask_BT = spans.closed(mask_BT=mask_BT, span_BT=scores.spans.span_BT)
    rows = batch.rollout_rows(
        rollout, scores, mask_BT, np.zeros(mask_BT.shape, np.float32), terms, weigh=functions.weigh
    )
    frozen = Frozen(teacher=decoder.head_alone(teacher))
    gradient, parts = functions.accumulate(student, frozen, rows, None, terms.weights)
    return parts, jax.flatten_util.ravel_pytree(gradient)[0], mask_BT


def one_tokenizer(folders, **loss):
    """A config of the divergence alone, whose models share a tokenizer."""
    config = small(folders, "opd")
    config.loss.update({"pg_weight": 0.0, "divergence_weight": 1.0, "aggregation": "token"} | loss)
    config.scoring.span_room = 1.0  # the models have 160 positions
    return config


@pytest.mark.parametrize(
    ("compared", "direction"),
    [("candidates", "reverse"), *slow(("candidates", "forward"), ("matched", "reverse"), ("matched", "jsd"))],
)  # fmt: skip
def test_one_tokenizer_through_spans_is_the_plain_path(folders, compared, direction):
    config = one_tokenizer(folders, direction=direction)
    config.scoring.compare = "ids"
    plain, want, plain_BT = learned(config)
    config.scoring.compare, config.loss.span_events = "spans", compared
    parts, got, mask_BT = learned(config)
    np.testing.assert_array_equal(mask_BT, plain_BT)
    assert float(parts["divergence"]) == pytest.approx(float(plain["divergence"]), abs=1e-6)
    assert float(plain["divergence"]) > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(want).max() > 3e-4


def test_sorted_probabilities_of_one_tokenizer(folders):
    """The mean over tokens of the distance, from whole logits."""
    config = one_tokenizer(folders, span_events="sorted")
    config.scoring.compare = "spans"
    parts, _, mask_BT = learned(config)
    setup = make_setup(config)
    rollout, _ = golden_rollout(setup)
    sorted_BTV = []
    for role in ("student", "teacher"):
        architecture, params = models.load(config[role].path)
        every = calls.forward(params, architecture, rollout.tokens_BT, rollout.length_B)
        every = setup.spec.events.restrict(every)
        sorted_BTV.append(np.sort(jax.nn.softmax(every), axis=-1))
    distance_BT = np.abs(sorted_BTV[0] - sorted_BTV[1]).sum(-1)
    want = np.roll(distance_BT, 1, axis=1)[mask_BT].mean()
    assert float(parts["divergence"]) == pytest.approx(want, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("compared", SPAN_EVENTS)
def test_two_tokenizers_learn_from_each_span(tmp_path, compared):
    """Chunks of 64 tokens and of 256: the same loss and gradient."""
    config = two_tokenizers(tmp_path)
    config.scoring.compare = "spans"
    config.loss.update({"pg_weight": 0.0, "divergence_weight": 1.0, "span_events": compared})
    parts, whole, _ = learned(config)
    assert float(parts["divergence"]) > 1e-3
    config.optim.token_chunk = 64
    cut, got, _ = learned(config)
    assert float(cut["divergence"]) == pytest.approx(float(parts["divergence"]), rel=1e-5)
    np.testing.assert_allclose(got, whole, atol=1e-6)


def test_a_span_with_a_masked_token_does_not_count(tmp_path):
    scores = Scores(np.zeros(SPAN.shape, np.float32), np.zeros(SPAN.shape, np.float32))
    tokens, heads, hidden = toy()
    rows, _ = rows_of("candidates", tokens, heads, hidden, np.zeros(SPAN.shape))
    found = SpanScores(SPAN, SPAN, SPAN, SPAN, SPAN, SPAN, jax.tree.map(np.asarray, rows.spans))
    counted_BT = SPAN >= 0
    counted_BT[0, 5] = False
    got = batch.counted_spans(scores.replace(spans=found), counted_BT)
    assert got.span_BT[0].tolist() == [-1, 0, 1, 1, -1, -1, -1, -1]
    assert got.span_BT[1].tolist() == SPAN[1].tolist()
    assert batch.counted_spans(scores, counted_BT) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support": "student"}, "loss.support=student, which has top-k ids of one vocabulary"),
        ({"gate": "entropy", "direction": "forward", "gate_threshold": 0.8}, "loss.gate=entropy, which"),
        ({"golden_divergence": 1.0}, r"loss.golden_divergence=1\.0"),
    ],
    ids=["support", "gate", "golden"],
)  # fmt: skip
def test_what_a_divergence_by_spans_cannot_have_is_refused(folders, changes, message):
    config = one_tokenizer(folders, **changes)
    model_limits.check_spans(one_tokenizer(folders), default_terms(divergence_weight=1.0))
    with pytest.raises(ConfigError, match=rf"{message}.* by spans of text .*; set --config\."):
        model_limits.check_spans(config, make_terms(config))


@pytest.mark.parametrize(
    ("compare", "changes", "message"),
    [
        (
            "spans",
            {"span_events": "sorted", "direction": "forward"},
            "direction=forward has no effect: .* has no direction",
        ),
        (
            "spans",
            {"span_events": "sorted", "divergence_weight": 0.0, "pg_weight": 1.0},
            "span_events=sorted has no effect: loss.divergence_weight=0",
        ),
        ("auto", {"span_events": "matched"}, "effect: scoring.compare=auto .*config.scoring.compare=spans$"),
    ],
    ids=["direction", "no divergence", "ids"],
)  # fmt: skip
def test_numbers_that_nothing_reads_are_refused(folders, compare, changes, message):
    config = one_tokenizer(folders, **changes)
    config.scoring.compare = compare
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.slow
@pytest.mark.parametrize("compared", SPAN_EVENTS)
def test_a_run(tmp_path, capsys, compared):
    """Three steps, and one more after a resume, which is that of a run without a break."""
    config = two_tokenizers(tmp_path)
    config.scoring.compare = "spans"
    config.loss.update({"pg_weight": 0.0, "divergence_weight": 1.0, "span_events": compared})
    config.eval.data, config.steps = "", 3
    train.run(config, str(tmp_path / "run"), command=["test"])
    assert f"loss.span_events={compared}: " in capsys.readouterr().out
    rows = [row for row in lines(tmp_path / "run", "metrics.jsonl") if "loss/divergence" in row]
    assert len(rows) == 3
    assert all(row["loss/divergence"] > 0 for row in rows)
    config.steps = 4
    for name in ("run", "straight"):  # resumed, and without a break: the same to the last digit
        train.run(config, str(tmp_path / name), command=["test"])
    learned_rows = [
        without_times([row for row in lines(tmp_path / name, "metrics.jsonl") if "loss/divergence" in row])
        for name in ("run", "straight")
    ]  # fmt: skip
    assert [len(found) for found in learned_rows] == [4, 4]
    assert learned_rows[0] == learned_rows[1]
