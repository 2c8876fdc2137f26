"""A teacher with another tokenizer: scores and advantages of spans, what is refused, and whole runs."""

import numpy as np
import pytest

from opd_jax import models, scoring, train
from opd_jax.errors import ConfigError, ModelError
from opd_jax.losses import spans
from opd_jax.metrics.step import span_metrics
from opd_jax.tools.probe.workload import make_plan
from opd_jax.training import batch, model_limits, span_scores
from opd_jax.training.advantages import advantages
from opd_jax.training.make_setup import make_setup
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.terms import default_terms, make_terms
from opd_jax.types import Outcome, Rollout, Scores, SpanScores
from tests.support.other_tokenizer import pair
from tests.support.small_run import lines, small

EXACT = 1e-6


def two_tokenizers(root, method: str = "opd"):
    """A small run of the pair, whose prompts have more tokens than those of the embedded models."""
    config = small(pair(root), method)
    config.rollout.max_prompt_tokens = 120
    return config


def rollout_of(prompts: list[list[int]], responses: list[list[int]], width: int) -> Rollout:
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens_BT[row, : len(prompt) + len(response)] = [*prompt, *response]
    prompt_B = np.array([len(p) for p in prompts], np.int32)
    length_B = prompt_B + np.array([len(r) for r in responses], np.int32)
    outcome_B = np.full(len(prompts), Outcome.EOS, np.int32)
    return Rollout(tokens_BT, length_B, prompt_B, np.zeros(tokens_BT.shape, np.float32), outcome_B)


def golden_rollout(setup) -> tuple[Rollout, list[list[int]]]:
    """Golden solutions as rollouts, one cut short and one an end alone, and the teacher's prompts."""
    problems = [setup.train[i] for i in range(4)]
    prompts = setup.student_style.prompts(problems, setup.tokenizer)
    responses = [
        [*g, setup.golden_end] for g in setup.student_style.golden(problems, setup.tokenizer)
    ]
    responses[1], responses[2] = responses[1][:20], [setup.golden_end]
    teachers = setup.teacher_style.prompts(problems, setup.teacher_tokenizer)
    return rollout_of(prompts, responses, setup.width), teachers


def scored(config) -> tuple[Scores, np.ndarray, np.ndarray]:
    """Scores, advantages and mask of these rollouts."""
    setup = make_setup(config)
    rollout, prompts = golden_rollout(setup)
    rows = None
    if setup.reader is not None:
        rows = span_scores.text_rows(
            rollout,
            prompts,
            setup.reader,
            width=setup.teacher_width,
            response=setup.teacher_response,
        )
    student, teacher = (models.load(config[role].path)[1] for role in ("student", "teacher"))
    scores = make_step_functions(setup.spec).score(student, teacher, rollout, rows)
    mask_BT = batch.scored_mask(rollout, setup.alignment.counted)
    if scores.spans is not None:
        mask_BT = spans.closed(mask_BT=mask_BT, span_BT=scores.spans.span_BT)
    advantage_BT = advantages(rollout, scores, mask_BT, make_terms(config))
    return scores, advantage_BT, mask_BT


@pytest.mark.parametrize(
    "changes",
    [{}, {"advantage_clamp": 0.5}, {"advantage_shape": "power", "advantage_shape_value": 0.5}],
    ids=["log-ratio", "clamp", "power"],
)
def test_one_tokenizer_through_spans_is_the_plain_path(folders, changes):
    config = small(folders, "opd")
    config.loss.update(changes)
    config.scoring.span_room = 1.0  # the models have 160 positions
    config.scoring.compare = "ids"
    _, plain_BT, plain_mask_BT = scored(config)
    config.scoring.compare = "spans"
    scores, got_BT, mask_BT = scored(config)
    assert (scores.spans.size_BT[mask_BT] == 1).all()
    assert scores.teacher_logprob_BT is None
    assert plain_mask_BT.sum() - mask_BT.sum() == 1  # the last token of the response that was cut
    assert not (mask_BT & ~plain_mask_BT).any()
    np.testing.assert_allclose(got_BT[mask_BT], plain_BT[mask_BT], atol=EXACT, rtol=EXACT)
    assert np.abs(got_BT[mask_BT]).max() > 0.01
    assert not got_BT[~mask_BT].any()


def test_a_span_has_the_sums_of_both_models(tmp_path):
    """Two tokenizers: log-probs of every span against those of single rows, token by token."""
    config = two_tokenizers(tmp_path)
    setup = make_setup(config)
    assert setup.reader is not None  # auto
    assert setup.separate_prompts
    rollout, prompts = golden_rollout(setup)
    scores, advantage_BT, mask_BT = scored(config)
    student, teacher = (models.load(str(tmp_path / name)) for name in ("student", "teacher"))
    joined = 0
    for row, reading in enumerate(setup.reader.read(rollout.responses())):
        first = int(rollout.prompt_length_B[row])
        mine = logprobs(*student, [*rollout.prompt(row), *rollout.response(row)], first)
        theirs = logprobs(*teacher, [*prompts[row], *reading.ids], len(prompts[row]))
        for span in range(reading.student_span.max(initial=-1) + 1):
            own = np.flatnonzero(reading.student_span == span)
            other = np.flatnonzero(reading.teacher_span == span)
            want = theirs[other].sum() - mine[own].sum()
            np.testing.assert_allclose(advantage_BT[row, first + own], want, atol=1e-4)
            assert mask_BT[row, first + own].all()
            assert (scores.spans.teacher_size_BT[row, first + own] == len(other)).all()
            joined += len(own) > 1 or len(other) > 1
    assert joined > 2
    total = (advantage_BT / np.maximum(scores.spans.size_BT, 1))[mask_BT].sum()
    by_span = span_metrics(scores.spans, mask_BT, rollout.response_mask_BT)
    np.testing.assert_allclose(by_span["score/span_log_ratio"], total / mask_BT.sum(), rtol=1e-5)


def logprobs(model: models.ModelConfig, params, ids: list[int], first: int) -> np.ndarray:
    """Log-probs of ids[first:] over the model's own tokens, of which the last is the end; one row."""
    tokens_BT = np.zeros((1, 320), np.int32)
    tokens_BT[0, : len(ids)] = ids
    length_B = np.array([len(ids)], np.int32)
    known = model.eos_token_ids[0] + 1  # no row of padding has mass
    logprob_BT = scoring.token_logprob(params, model, tokens_BT, length_B, vocabulary=known)
    return np.asarray(logprob_BT, float)[0, first : len(ids)]


def test_metrics_by_hand():
    """Spans ab (two tokens, one of the teacher) and c; the end is masked."""
    scores = SpanScores(
        span_BT=np.array([[-1, 0, 0, 1, 2]]), bytes_BT=np.array([[0, 1, 2, 2, 0]]),
        size_BT=np.array([[0.0, 2, 2, 1, 1]]), teacher_size_BT=np.array([[0.0, 1, 1, 1, 1]]),
        student_logprob_BT=np.array([[0.0, -3, -3, -1, -9]]),
        teacher_logprob_BT=np.array([[0.0, -2, -2, -1.5, 0]]),
    )  # fmt: skip
    mask_BT = np.array([[False, True, True, True, False]])
    response_BT = np.array([[False, True, True, True, True]])
    got = span_metrics(scores, mask_BT, response_BT)
    assert got == pytest.approx(
        {"score/span_log_ratio": 0.5 / 3, "score/span_log_ratio_per_byte": 0.1,
         "score/span_single": 1 / 3, "score/span_compared": 0.75}
    )  # fmt: skip
    nothing = span_metrics(scores, mask_BT & False, response_BT)
    assert set(nothing.values()) == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss.divergence_weight": 1.0},
            r"divergence_weight=1\.0, which compares distributions over one",
        ),
        ({"loss.golden_divergence": 1.0}, r"golden_divergence=1\.0, which compares distributions"),
        (
            {"loss.advantage": "support", "loss.support": "student"},
            "loss.advantage=support, which compares",
        ),
        ({"loss.advantage_shape": "baseline"}, "whose baseline is a KL over one vocabulary"),
        ({"loss.discount": 0.5}, "which counts tokens, not spans"),
        ({"loss.extrapolation": 1.25}, r"loss.extrapolation=1\.25, which needs .* a single token"),
        ({"loss.group_coef": 1.0, "loss.evidence_share": 0.5}, "loss.evidence_share=0.5"),
        ({"loss.token_weight": "iw"}, "loss.token_weight=iw"),
        ({"loss.rollout_gate": "agreement"}, "loss.rollout_gate=agreement"),
        ({"loss.low_kl_window": 64}, "loss.low_kl_window=64, which reads a KL"),
        ({"loss.outcome": "route", "loss.outcome_value": 1.0}, "loss.outcome=route"),
        ({"log.variants": 2}, "log.variants=2"),
        ({"scoring.special_tokens": "mask"}, "scoring.special_tokens=mask"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_needs_one_vocabulary_is_refused(folders, changes, message):
    config = small(folders, "opd")
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    model_limits.check_spans(small(folders, "opd"), default_terms())
    with pytest.raises(
        ConfigError, match=rf"{message}.* by spans of text .*; set --config\."
    ) as error:
        model_limits.check_spans(config, make_terms(config))
    assert "\n" not in str(error.value)


def test_ids_alone_refuse_another_tokenizer(tmp_path):
    config = two_tokenizers(tmp_path)
    config.scoring.compare = "ids"
    with pytest.raises(
        ModelError, match=r"ordinary ids differently .* --config.scoring.compare=spans$"
    ):
        make_setup(config)


def test_probes_refuse_another_tokenizer(tmp_path):
    with pytest.raises(
        ConfigError, match="has another tokenizer than the student, wanted the same"
    ):
        make_plan(two_tokenizers(tmp_path))


def test_a_prompt_and_a_response_must_fit_the_teacher(tmp_path):
    config = two_tokenizers(tmp_path)
    config.scoring.span_room = 4.0  # 496 tokens, and 512 positions
    with pytest.raises(
        Exception, match=r"teacher's prompt has \d+ tokens, wanted at most 16 .* or a smaller"
    ):
        make_setup(config)


@pytest.mark.slow
def test_a_run_by_spans(tmp_path, capsys):
    config = two_tokenizers(
        tmp_path, "stable_opd"
    )  # golden solutions and the reference KL beside it
    config.steps = 3
    train.run(config, str(tmp_path / "run"), command=["test"])
    said = capsys.readouterr().out
    assert "compared by spans of text" in said
    assert "of the student's tokens stand in spans of one" in said
    rows = [row for row in lines(tmp_path / "run", "metrics.jsonl") if "loss/opd" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["score/span_compared"] > 0.5
        assert row["score/span_log_ratio"] != 0
        assert not {"score/reverse_kl", "score/overlap_ratio", "score/advantage_mean"} & row.keys()
    one = lines(tmp_path / "run", "rollouts.jsonl")[0]
    assert "teacher_logprob" not in one
    assert np.abs(one["advantage"]).max() > 0
    config.steps = 4
    train.run(config, str(tmp_path / "run"), command=["test"])  # resumed
    assert "by spans" in capsys.readouterr().out
