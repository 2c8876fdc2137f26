"""Rollouts: which are shown, the text of each token, which of them repeat."""

import json

import pytest

from configs.recipes import recipe
from opd_jax.data import Tokenizer
from opd_jax.report.read import read
from opd_jax.report.samples import HEAD, TAIL, as_json, pieces, rollouts
from tests.support.workdirs import as_bytes, collapsing, healthy, make, rollout

pytestmark = pytest.mark.short


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return recipe("tiny").student.path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ab", ["a", "b"]),
        ("é!", ["", "é", "!"]),
        ("€", ["", "", "€"]),
        ("a😀b", ["a", "", "", "", "😀", "b"]),
        ("", []),
    ],
)
def test_a_character_stands_with_its_last_token(text, wanted):
    assert pieces(list(text.encode()), as_bytes) == wanted


def test_bytes_that_are_no_text_end_somewhere():
    ids = [*b"ab", 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, *b"c", 0xE2]
    found = pieces(ids, as_bytes)
    assert len(found) == len(ids)
    assert found[0] == "a"
    assert "c" in "".join(found)
    assert "".join(found).count("a") == 1


def test_pieces_of_the_embedded_tokenizer(tokenizer):
    decode = Tokenizer(tokenizer).decode
    ids = Tokenizer(tokenizer).encode("19*4=76; 76-19=57.\nCheck: x \\boxed{65} é€😀")
    assert "".join(pieces(ids, decode)) == decode(ids)


def test_a_rollout_with_its_scores(tmp_path, tokenizer):
    ids = Tokenizer(tokenizer).encode("1+1=")
    line = rollout(3, response_ids=ids, outcome="eos", correct=True)
    folder = make(tmp_path / "run", healthy(3), rollouts=[line])
    (sample,), notes = rollouts(read(folder), 4, tokenizer)
    assert notes == []
    assert (sample.step, sample.correct, sample.outcome, sample.skipped) == (3, True, "eos", 0)
    assert "".join(token.text for token in sample.tokens) == "1+1="
    scores = [(t.student_logprob, t.teacher_logprob, t.advantage) for t in sample.tokens]
    assert scores == [(-0.1, -0.1, 0.0), (-0.2, -4.2, -4.0), (None, None, None), (-0.4, 0.0, 0.4)]
    assert json.loads(as_json(sample))[2] == [None, None, None]


def test_repetitive_tokens_are_those_of_the_runs_rule(tmp_path, tokenizer):
    ids = Tokenizer(tokenizer).encode("2+3=5; " + "7" * 30)
    fields = {"metrics_repetition_tail": 20, "metrics_repetition_threshold": 1.5}
    line = rollout(1, response_ids=ids, advantage=[], student_logprob=[], teacher_logprob=[])
    folder = make(tmp_path / "run", healthy(2), rollouts=[line], **fields)
    (sample,), _ = rollouts(read(folder), 1, tokenizer)
    tail = "".join(token.text for token in sample.tokens if token.repeated)
    assert tail == "7" * 20
    assert not sample.tokens[0].repeated
    assert sample.tokens[0].advantage is None  # no scores in the line


def test_without_the_tokenizer_tokens_are_ids(tmp_path):
    folder = make(tmp_path / "run", healthy(2), rollouts=[rollout(1)])
    (sample,), (note,) = rollouts(read(folder), 1)
    assert [token.text for token in sample.tokens] == ["[49]", "[43]", "[49]", "[61]"]
    assert "--tokenizer=DIR" in note


def test_a_long_response_is_shown_at_both_ends(tmp_path):
    size = HEAD + TAIL + 5
    line = rollout(1, response_ids=[*range(size)], advantage=[float(i) for i in range(size)])
    (sample,), _ = rollouts(read(make(tmp_path / "run", healthy(2), rollouts=[line])), 1)
    assert (sample.length, sample.skipped, len(sample.tokens)) == (size, 5, size - 5)
    assert sample.tokens[HEAD - 1].text == f"[{HEAD - 1}]"
    assert sample.tokens[HEAD].text == f"[{HEAD + 5}]"
    assert sample.tokens[HEAD].advantage == HEAD + 5.0


def test_samples_are_from_all_of_the_run_and_from_the_onset(tmp_path):
    lines = [rollout(step, sample=i) for step in range(1, 61) for i in range(2)]
    run = read(make(tmp_path / "run", collapsing(60), rollouts=lines))
    shown, _ = rollouts(run, 6)
    steps = [sample.step for sample in shown]
    assert len(steps) == 6
    assert steps == sorted(set(steps))
    assert {1, 60, run.verdict.onset, run.verdict.alarm} <= set(steps)
    assert {(sample.id, sample.number) for sample in shown} == {("a-1", 0)}


def test_lines_that_are_not_as_they_should_be(tmp_path):
    broken = [
        rollout(1, response_ids="x"),
        rollout(2, response_ids=[-1]),
        rollout(3, response_ids=[]),
    ]
    folder = make(tmp_path / "run", healthy(2), rollouts=broken)
    found, notes = rollouts(read(folder), 5)
    assert found == []
    assert "not as train.py writes them" in notes[0]
    odd = rollout(4, advantage=["x", None], outcome=7, correct="yes", prompt=None, id=7, sample="x")
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(odd) + "\n" + '{"step": 5, "id"')
    (sample,), _ = rollouts(read(folder), 5)
    assert (sample.step, sample.outcome, sample.correct) == (4, "unknown", None)
    assert (sample.id, sample.number) == ("", 0)
    assert [token.advantage for token in sample.tokens] == [None] * 4


def test_no_rollouts_is_a_sentence(tmp_path):
    folder = make(tmp_path / "run", healthy(2))
    assert "no rollouts.jsonl" in rollouts(read(folder), 5)[1][0]
    (folder / "rollouts.jsonl").write_text("nonsense\n")
    assert "no line that can be read" in rollouts(read(folder), 5)[1][0]


def test_a_config_of_another_time_has_the_default_rule(tmp_path, tokenizer):
    folder = make(tmp_path / "run", healthy(2), rollouts=[rollout(1)])
    (folder / "config.json").write_text(
        '{"student": {"path": "x"}, "metrics": {"repetition_tail": "x"}}'
    )
    (sample,), _ = rollouts(read(folder), 1, tokenizer)
    assert not any(token.repeated for token in sample.tokens)
