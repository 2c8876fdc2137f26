"""Whole probes, of pairs and second teachers."""

import json

import numpy as np
import pytest

from configs import opd
from opd_jax import models
from opd_jax.errors import DataError
from opd_jax.tools import probe
from opd_jax.tools.probe import continuation, pair, workload, writing
from tests.tools.probe.conftest import questions


def without_speed(report: dict) -> dict:
    kept = json.loads(json.dumps(report))
    del kept["run"], kept["student"]["speed"]
    for teacher in kept["teachers"]:
        del teacher["speed"]
    return kept


@pytest.mark.slow
def test_pair_of_a_student_and_itself_another_and_one_with_other_ids(
    small, folders, tmp_path, capsys
):
    paths = [str(folders / name) for name in ("student", "teacher", "other")]
    file = tmp_path / "new" / "report.json"
    report = probe.run("pair", small, teachers=paths, out=str(file), command=["test"])
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    itself, another, other = report["teachers"]
    assert itself["figures"]["reverse_kl"] == itself["figures"]["advantage_mean"] == 0.0
    assert itself["figures"]["overlap_ratio"] == 1.0
    assert another["figures"]["reverse_kl"] > 0.01
    assert another["figures"]["advantage_mean"] < 0
    assert 0 < another["figures"]["overlap_ratio"] < 1
    assert other["figures"]["tokens"] == another["figures"]["tokens"]  # all of its ids are remapped
    assert [teacher["path"] for teacher in report["teachers"]] == report["teachers_from"] == paths
    assert len(report["records"]) == 7
    record = report["records"][0]
    assert record["student"]["grade"] in ("WRONG", "UNPARSED")
    assert {"text", "grade", "length", "advantage", "overlap_ratio"} <= record["teacher 3"].keys()
    assert report["run"]["command"] == ["test"]
    assert report["config"]["probe"]["problems"] == 7
    said = capsys.readouterr().out
    assert "verdict: teacher 2, " in said
    assert "remapped to <tool> (256)" in said  # the report on the vocabularies
    for teacher in report["teachers"]:
        assert teacher["conclusion"] in said
    again = probe.run("pair", small, teachers=paths, command=["test"])
    assert without_speed(again) == without_speed(report)
    assert [f.name for f in file.parent.iterdir()] == ["report.json"]


def test_figures_equal_those_of_the_whole_logits(small, folders, monkeypatch):
    """Reverse KL and overlap from the logits of whole rows, in numpy."""
    made = []
    real = pair.write
    monkeypatch.setattr(pair, "write", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    report = probe.run("pair", small, command=[])
    rollout = made[0]
    said = []
    for name in ("student", "teacher"):
        model, params = models.load(str(folders / name))
        logits_BTV = np.asarray(
            models.forward(params, model, rollout.tokens_BT, rollout.length_B), np.float64
        )
        # Both end a response of both models: one event, under the id that closes a turn.
        logits_BTV[..., 258] = np.logaddexp(logits_BTV[..., 256], logits_BTV[..., 258])
        logits_BTV = np.delete(logits_BTV, 256, axis=-1)
        said.append(logits_BTV - np.log(np.sum(np.exp(logits_BTV), axis=-1, keepdims=True)))
    kls, overlaps, gaps = [], [], []
    for i in range(7):
        for t in range(int(rollout.prompt_length_B[i]), int(rollout.length_B[i])):
            p, q = said[0][i, t - 1], said[1][i, t - 1]
            kls.append(float(np.sum(np.exp(p) * (p - q))))
            tops = [set(np.argsort(x)[-16:].tolist()) for x in (p, q)]
            overlaps.append(len(tops[0] & tops[1]) / 16)
            gaps.append(abs(np.sum(np.exp(p) * p) - np.sum(np.exp(q) * q)))
    figures = report["teachers"][0]["figures"]
    assert figures["tokens"] == len(kls)
    assert figures["reverse_kl"] == pytest.approx(np.mean(kls), abs=1e-5)
    assert figures["overlap_ratio"] == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert figures["entropy_gap"] == pytest.approx(np.mean(gaps), abs=1e-5)


def test_problems_without_answers_are_measured_but_not_graded(small, tmp_path):
    small.data.train = questions(tmp_path / "open.jsonl", answer="")
    report = probe.run("pair", small, command=[])
    assert "accuracy" not in report["student"]["answers"]
    assert report["teachers"][0]["gain"] is None
    rated = {line["what"]: line["rating"] for line in report["teachers"][0]["verdict"]}
    assert rated["new knowledge"] == "unknown"
    with pytest.raises(DataError, match=r"problem open-\d has no answer, but the probe"):
        probe.run("continuation", small, command=[])


def test_continuation_goes_on_behind_the_students_tokens_in_the_teachers_ids(
    small, folders, tmp_path, monkeypatch, capsys
):
    small.teacher.path = str(folders / "other")
    small.probe.depths = (12, 5)
    asked = []
    real = writing.sample_responses

    def listening(model, prompts, sampling, **settings):
        done = real(model, prompts, sampling, **settings)
        asked.append((prompts, sampling, done))
        return done

    monkeypatch.setattr(writing, "sample_responses", listening)
    out = tmp_path / "report.json"
    report = probe.run("continuation", small, out=str(out), command=["test"])
    made = workload.make_plan(small)
    student = writing.student_writer(made)
    teacher = writing.teacher_writer(made.setups[0], made.problems)
    first = [done for _, _, done in asked[:2]]  # seven rollouts, in two batches of four
    responses = [
        first[i // 4].response(i % 4)
        for i in range(7)
        if first[i // 4].response_length_B[i % 4] > 12
    ]
    which = [i for i in range(7) if first[i // 4].response_length_B[i % 4] > 12]
    assert 2 <= len(which) <= 7
    calls = asked[2:]
    each = -(-len(which) // 4)
    assert len(calls) == 6 * each
    for number, (writer, depth) in enumerate(
        (writer, depth) for writer in (student, teacher) for depth in (0, 5, 12)
    ):
        batches = calls[number * each : (number + 1) * each]
        prompts = [prompt for batch, _, _ in batches for prompt in batch][: len(which)]
        for prompt, problem, response in zip(prompts, which, responses, strict=True):
            own = writer.prompts[problem]
            assert prompt[: len(own)] == own
            behind = prompt[len(own) :]
            assert len(behind) == depth
            texts = [
                tokenizer.hf.convert_ids_to_tokens(ids)
                for tokenizer, ids in (
                    (writer.tokenizer, behind), (student.tokenizer, response[:depth]),
                )
            ]  # fmt: skip
            assert texts[0] == texts[1]
        for _, sampling, done in batches:
            assert sampling.max_response_tokens == 24 - depth
            assert done.tokens_BT.shape[1] == max(map(len, writer.prompts)) + 24
            assert sampling.stop_ids == writer.stop_ids
    assert [row["depth"] for row in report["depths"]] == [0, 5, 12]
    assert {row["gain"]["count"] for row in report["depths"]} == {len(which)}
    assert report["rollouts_longer_than"]["12"] == len(which)
    cut = [i for i, record in enumerate(report["records"]) if "depths" in record]
    assert cut == which
    record = report["records"][which[0]]
    assert record["depths"].keys() == {"0", "5", "12"}
    assert record["depths"]["12"]["student"]["text"].startswith(
        student.tokenizer.decode(responses[0][:12]).rstrip("�")
    )
    assert 12 < record["depths"]["12"]["teacher"]["length"] <= 24
    said = capsys.readouterr().out
    assert f"{len(which)} of 7 rollouts have more than 12 tokens" in said
    assert report["conclusion"] in said
    assert json.loads(out.read_text())["probe"] == "continuation"


def test_what_only_training_needs_is_not_asked_for(small):
    small.eval.data, small.eval.best, small.guard.action = "tiny:test", "accuracy", "rollback"
    made = workload.make_plan(small)
    assert not made.setups[0].terms.needs_reference
    assert not made.setups[0].terms.needs_golden


def test_no_rollout_is_long_enough(small, monkeypatch):
    small.probe.depths = (23,)
    monkeypatch.setattr(continuation, "long_enough", lambda length_B, depth: [])
    with pytest.raises(DataError, match=r"none of 7 rollouts has more than 23 tokens"):
        probe.run("continuation", small, command=[])


@pytest.mark.slow
def test_a_teacher_that_is_the_student_with_another_prompt(small, capsys):
    small.teacher.path, small.teacher.follow = "student", "live"
    small.data.teacher_prompt_template = "{problem}{answer}"
    report = probe.run("pair", small, command=[])
    assert report["teachers"][0]["figures"]["reverse_kl"] > 0
    assert "the teacher gets a prompt of its own" in capsys.readouterr().out


def test_the_last_batch_has_the_shapes_of_the_others(small, monkeypatch):
    sizes = []
    real = writing.sample_responses
    monkeypatch.setattr(
        writing,
        "sample_responses",
        lambda m, prompts, *s, **k: sizes.append(len(prompts)) or real(m, prompts, *s, **k),
    )
    report = probe.run("pair", small, command=[])
    assert sizes == [4, 4, 4, 4]
    assert len(report["records"]) == 7


@pytest.mark.long
@pytest.mark.slow
def test_the_embedded_pair(tmp_path):
    """The teacher is worth training with, and helps less the deeper the student's prefix."""
    report = probe.run("pair", opd.get_config(), command=["test"])
    teacher = report["teachers"][0]
    assert teacher["answers"]["accuracy"] > 0.8 > 0.65 > report["student"]["answers"]["accuracy"]
    assert 0.05 < teacher["figures"]["reverse_kl"] < 0.2
    assert teacher["figures"]["advantage_right"] > teacher["figures"]["advantage_wrong"]
    assert teacher["conclusion"].startswith("Worth training")
    config = opd.get_config()
    config.probe.problems = (
        256  # of 64 half are left behind long prefixes: the gain is then +-9 points
    )
    depths = probe.run("continuation", config, command=["test"])["depths"]
    gains = [row["gain"]["value"] for row in depths]
    assert gains[0] > 0.4
    assert gains[0] > gains[-1] + 0.2
    assert depths[-1]["drop"]["value"] < -0.1
