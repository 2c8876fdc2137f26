"""launch/evaluate.py on the embedded models: what is written, kills, slots and order, bad input."""

import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import evaluate as evaluate_config
from opd_jax.data import arithmetic
from opd_jax.data.files import stream
from opd_jax.errors import ConfigError, DataError, ModelError, WorkdirError
from opd_jax.evaluation import run as runner
from opd_jax.evaluation import subject as subjects
from opd_jax.grading import Grade, Grader
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import sample_responses
from tests.checkpoint.test_export import write_run
from tests.support.paths import ROOT, STUDENT


def small(**changes):
    """11 problems x 2 answers in batches of 8: two whole ones and a rest."""
    config = evaluate_config.get_config()
    config.eval.problems = 11
    config.eval.samples = 2
    config.eval.batch = 8
    config.eval.max_response_tokens = 100
    for field, value in changes.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


def rows_of(folder, name="tiny"):
    return [row for _, row in stream(str(folder / "eval" / f"{name}.jsonl"))]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    """The workdir of an undisturbed evaluation."""
    folder = tmp_path_factory.mktemp("evaluations") / "straight"
    runner.run(small(), str(STUDENT), str(folder), command=["test"])
    return folder


def test_answers(straight):
    rows = rows_of(straight)
    assert [(row["problem"], row["sample"]) for row in rows] == [divmod(i, 2) for i in range(22)]
    assert {row["outcome"] for row in rows} <= {"eos", "budget"}
    for row in rows:
        assert row["id"] == f"tiny-test-{row['problem']}"
        assert 1 <= row["length"] <= 100
        assert "Start with" in row["prompt"]
    with Grader() as grader:
        again = grader.grade((row["answer"], row["gold"]) for row in rows)
    assert [grade.name for grade in again] == [row["grade"] for row in rows]
    assert Grade.CORRECT in again
    assert rows[0]["answer"] != rows[1]["answer"] or rows[2]["answer"] != rows[3]["answer"]


def test_results(straight):
    report = json.loads((straight / "results.json").read_text())
    rows = rows_of(straight)
    found = report["results"]["tiny"]
    assert found["accuracy"] == pytest.approx(np.mean([r["grade"] == "CORRECT" for r in rows]))
    assert sum(found["grades"].values()) == 22
    assert report["sampled_here"]["tokens"] == sum(row["length"] for row in rows) == found["tokens"]
    assert report["model"]["step"] is None
    assert len(report["model"]["sha256"]) == 64
    asked = report["benchmarks"]["tiny"]
    shown = [[row["id"], row["prompt"], row["gold"]] for row in rows[::2]]
    assert asked["sha256"] == hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    assert asked["first_prompt"] == rows[0]["prompt"]
    assert report["protocol"] == "own"  # 100 tokens, 2 samples
    assert json.loads((straight / "run.json").read_text())["command"] == ["test"]
    assert "avg@2" in (straight / "results.txt").read_text()
    assert (straight / "results.md").read_text().startswith("| ")


@pytest.mark.slow
def test_an_evaluation_killed_anywhere_ends_in_the_same_bytes(straight, tmp_path):
    whole = (straight / "eval" / "tiny.jsonl").read_bytes()
    folder = tmp_path / "killed"
    shutil.copytree(straight, folder)
    file = folder / "eval" / "tiny.jsonl"
    draw = random.Random(0)
    lines = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in [0, lines[7], lines[-1] - 1, *(draw.randrange(len(whole)) for _ in range(7))]:
        file.write_bytes(whole[:cut])
        for name in ("results.json", "results.txt", "results.md"):
            (folder / name).unlink()
        runner.run(
            small(eval__slots=3), str(STUDENT), str(folder), command=[]
        )  # slots change nothing
        assert file.read_bytes() == whole, cut
    file.write_bytes(whole[: lines[4]] + b"\0\0\0\n")  # a machine that lost power
    runner.run(small(), str(STUDENT), str(folder), command=[])
    assert file.read_bytes() == whole


def test_nothing_is_done_twice(straight, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(straight, folder)
    monkeypatch.setattr(runner, "sample_responses", None)
    report = runner.run(small(), str(STUDENT), str(folder), command=[])
    assert report["sampled_here"]["tokens"] == 0
    assert report["results"] == json.loads((straight / "results.json").read_text())["results"]


def test_a_problems_answers_do_not_depend_on_the_others(straight, tmp_path):
    runner.run(small(eval__problems=3), str(STUDENT), str(tmp_path / "fewer"), command=[])
    assert rows_of(tmp_path / "fewer") == rows_of(straight)[:6]


@pytest.mark.slow
def test_avg_at_32_is_the_same_whatever_the_slots_chunks_batches_and_order(tmp_path, monkeypatch):
    """The same answers, not only the same figure: 4 problems of a file x 32, in whatever company."""
    problems = [arithmetic.problem("test", i) for i in range(4)]

    def answers(name, problems, *, chunk=None, **changes):
        def in_chunks(*given, batching, **more):
            return sample_responses(
                *given, batching=dataclasses.replace(batching, chunk=chunk), **more
            )

        monkeypatch.setattr(runner, "sample_responses", in_chunks)
        file, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        file.write_text(
            "".join(json.dumps({"id": p.id, "problem": p.prompt, "answer": p.answer}) + "\n"
                    for p in problems)
        )  # fmt: skip
        config = small(
            eval__benchmarks=f"mine={file}", eval__problems=0, eval__samples=32, **changes
        )
        report = runner.run(config, str(STUDENT), str(folder), command=[])
        rows = rows_of(folder, "mine")
        kept = {(r["id"], r["sample"]): (r["answer"], r["grade"], r["length"]) for r in rows}
        return report["results"]["mine"], kept

    found, kept = answers("plain", problems, eval__batch=128)
    assert found["metric"] == "avg@32"
    assert 0 < found["accuracy"] < 1
    assert len({answer for answer, _, _ in kept.values()}) > 32  # samples differ
    for given in (
        {"name": "slots", "eval__slots": 5, "eval__batch": 128},
        {"name": "chunks", "eval__slots": 9, "eval__batch": 128, "chunk": 3},
        {"name": "batches", "eval__batch": 50, "chunk": 1},
    ):
        assert answers(given.pop("name"), problems, **given) == (found, kept)
    turned, also = answers("order", problems[::-1], eval__batch=128, eval__slots=7)
    assert also == kept
    # The bootstrap draws problems by their places; the others are figures of a set.
    for name in ("accuracy", "stderr", "maj_at_k", "length_mean", "truncation_rate", "pass_at"):
        assert turned[name] == pytest.approx(found[name], rel=1e-12), name
    assert turned["grades"] == found["grades"]


@pytest.mark.short
def test_keys_are_of_seed_prompt_and_sample():
    texts, which = ["one", "two", "one"], [(0, 0), (0, 1), (1, 0), (2, 0)]

    def keys(seed, texts, which):
        return jax.random.key_data(runner.answer_keys(seed, texts, which)).tolist()

    bits = keys(0, texts, which)
    assert len({tuple(key) for key in bits + keys(1, texts, which)}) == 8
    assert keys(0, texts, which[::-1]) == bits[::-1]
    assert keys(0, ["two", "one", "one"], [(1, 0), (1, 1), (0, 0), (2, 0)]) == bits
    assert jax.random.key_data(key_for(0, 0, Stream.BENCHMARK)).tolist() not in bits


@pytest.mark.slow
def test_several_benchmarks_and_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "".join(json.dumps({"problem": f"Start with {i}, add 2.", "answer": str(i + 2)}) + "\n"
                for i in (3, 4))
    )  # fmt: skip
    config = small(eval__benchmarks=f"tiny,mine={file}", eval__problems=2)
    report = runner.run(config, str(STUDENT), str(tmp_path / "run"), command=[])
    assert list(report["results"]) == ["tiny", "mine"]
    assert report["table"][0].keys() == {"method", "source", "tiny", "mine"}
    assert [row["gold"] for row in rows_of(tmp_path / "run", "mine")] == ["5", "5", "6", "6"]
    # Another benchmark may be added to a workdir; what is there stays.
    before = (tmp_path / "run" / "eval" / "mine.jsonl").read_bytes()
    report = runner.run(
        small(eval__benchmarks=f"mine={file}", eval__problems=2), str(STUDENT),
        str(tmp_path / "run"), command=[],
    )  # fmt: skip
    assert list(report["results"]) == ["mine"]
    assert list(report["benchmarks"]) == ["tiny", "mine"]  # what was asked stays known
    assert (tmp_path / "run" / "eval" / "mine.jsonl").read_bytes() == before


def test_the_checkpoint_of_a_run(straight, tmp_path):
    write_run(tmp_path / "run", (0, 3))  # at step 0 the student itself
    report = runner.run(small(), str(tmp_path / "run"), str(tmp_path / "e"), step=0, command=[])
    assert report["model"]["step"] == 0
    assert report["table"][0]["method"] == "run, step 0"
    assert rows_of(tmp_path / "e") == rows_of(straight)
    with pytest.raises(WorkdirError, match=r"another evaluation \(.*step: 0 there, 3 now"):
        runner.run(small(), str(tmp_path / "run"), str(tmp_path / "e"), command=[])
    with pytest.raises(WorkdirError, match="no checkpoint of step 2"):
        runner.run(small(), str(tmp_path / "run"), str(tmp_path / "f"), step=2, command=[])


def test_a_folder_that_an_older_version_began(straight, tmp_path):
    header = json.loads((straight / "evaluation.json").read_text())

    def older(without, **now):
        fields = {k: v for k, v in header["fields"].items() if k != without}
        (tmp_path / "evaluation.json").write_text(json.dumps(header | {"fields": fields}))
        return runner.check_workdir(tmp_path, header | {"fields": header["fields"] | now})

    assert older("metrics.repetition_level") == header["benchmarks"]
    with pytest.raises(WorkdirError, match=r"\(metrics.repetition_level: 6 there, 9 now\)"):
        older("metrics.repetition_level", **{"metrics.repetition_level": 9})
    with pytest.raises(WorkdirError, match=r"\(data.date: '' there, '2026-01-31' now\)"):
        older("", **{"data.date": "2026-01-31"})
    with pytest.raises(WorkdirError, match=r"\(grading.grader: 'that of an older version' there, "):
        older("grading.grader")


def refused(kind, says, tmp_path, *, model=STUDENT, step=None, folder=None, **changes):
    out = folder or tmp_path / "refused"
    with pytest.raises(kind, match=says) as error:
        runner.run(small(**changes), str(model), str(out), step=step, command=[])
    assert "\n" not in str(error.value)
    assert folder or not out.exists()


def test_bad_input(tmp_path):
    def no(kind, says, **more):
        refused(kind, says, tmp_path, **more)

    no(
        ConfigError,
        "eval.backbone='Qwen' has no .*set it to one of Qwen2.5-Math-1.5B",
        eval__backbone="Qwen",
    )
    no(ConfigError, "eval.benchmarks='' names no benchmark", eval__benchmarks="")
    no(ConfigError, "gives the same answer every time", eval__temperature=0.0)
    no(ConfigError, "without {answer}", data__prompt_template="{problem} {answer}")
    no(ConfigError, "eval.fallbacks", eval__fallbacks=("answer",))
    no(ConfigError, "max_response_tokens=", eval__max_response_tokens=100_000)
    no(ConfigError, "step=3 is for the workdir", step=3)
    no(ModelError, "nowhere", model=tmp_path / "nowhere")
    no(DataError, "does not exist", eval__benchmarks=f"aime24={tmp_path / 'x.json'}")
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "?", "answer": "1"}\n')
    no(DataError, "has 1 problems, but GSM8K has 1319", eval__benchmarks=f"gsm8k={file}")
    bare = tmp_path / "bare"
    shutil.copytree(STUDENT, bare)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (bare / name).exists():
            text = (bare / name).read_text()
            found = json.loads(text) if name.endswith(".json") else {}
            found.pop("chat_template", None)
            (bare / name).write_text(json.dumps(found)) if found else (bare / name).unlink()
    no(ModelError, "no chat template, wanted one", model=bare, data__system_prompt="Think.")


def test_a_workdir_of_something_else(straight, tmp_path):
    folder = tmp_path / "there"
    shutil.copytree(straight, folder)
    refused(WorkdirError, "eval.temperature: 1.0 there, 0.5 now", tmp_path, folder=folder,
            eval__temperature=0.5)  # fmt: skip
    refused(WorkdirError, "grading.grader: 'guarded' there, 'math_verify' now", tmp_path, folder=folder,
            grading__grader="math_verify")  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("")
    refused(WorkdirError, "not an evaluation", tmp_path, folder=other)


def test_broken_lines_in_the_file_of_answers(straight, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(straight, folder)
    file = folder / "eval" / "tiny.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    for broken in (b'{"problem": 2', b"[]", lines[9]):
        file.write_bytes(b"\n".join([*lines[:4], broken, *lines[5:]]))
        before = file.read_bytes()
        refused(WorkdirError, "tiny.jsonl, line 5: not the answer", tmp_path, folder=folder)
        assert file.read_bytes() == before
    runner.run(small(data__bad_rows="skip"), str(STUDENT), str(folder), command=[])
    assert file.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.long
def test_processes_killed_ten_times_at_random(tmp_path):
    """The command itself, ended by SIGKILL at ten random moments of its life, then left alone."""

    def command(folder):
        return [
            sys.executable, "launch/evaluate.py", f"--model={STUDENT}", f"--workdir={folder}",
            "--config.eval.problems=200", "--config.eval.samples=16", "--config.eval.batch=16",
            "--config.eval.max_response_tokens=100",
        ]  # fmt: skip

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    draw = random.Random(1)
    file = tmp_path / "killed" / "eval" / "tiny.jsonl"
    seen = []
    for _ in range(10):
        process = subprocess.Popen(
            command(tmp_path / "killed"), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(0, 0.35 * took))
        process.kill()
        process.wait()
        seen.append(file.read_bytes().count(b"\n") if file.exists() else 0)
    print(f"\n{took:.1f} s undisturbed; answers there after each kill: {seen}")
    assert len(set(seen)) > 3  # kills in the midst of it
    subprocess.run(command(tmp_path / "killed"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert file.read_bytes() == (tmp_path / "whole" / "eval" / "tiny.jsonl").read_bytes()
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"]
               for name in ("whole", "killed")]  # fmt: skip
    assert results[0] == results[1]


def test_a_run_is_asked_as_it_was_trained(tmp_path):
    """Its chat template without thinking, where it was trained so, unless told otherwise."""
    write_run(tmp_path / "run", (1,))
    file = tmp_path / "run" / "config.json"
    written = json.loads(file.read_text())
    for trained, asked, wanted in ((True, True, True), (False, True, False), (True, False, False)):
        written["student"]["enable_thinking"] = trained
        file.write_text(json.dumps(written))
        config = evaluate_config.get_config()
        config.student.enable_thinking = asked
        subject = subjects.open_subject(str(tmp_path / "run"), config, step=None)
        assert subject.tokenizer.enable_thinking is wanted
