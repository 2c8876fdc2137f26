"""launch/evaluate.py from a shell: what is refused costs one line, status 1, and nothing on disk."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support.lanes import slow
from tests.support.paths import ROOT

STUDENT = ROOT / "opd_jax" / "tiny" / "student"
GOOD = [{"question": f"Start with {i}, add 2.", "answer": str(i + 2)} for i in range(3)]


def evaluate(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch/evaluate.py", *arguments],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip


def write(file: pathlib.Path, rows: list[dict], broken: str = "") -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + broken)
    return str(file)


def without_template(folder: pathlib.Path) -> str:
    """The embedded student as a base model, whose tokenizer has no chat template."""
    shutil.copytree(STUDENT, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text())
    found.pop("chat_template", None)
    file.write_text(json.dumps(found))
    return str(folder)


@pytest.mark.parametrize(
    ("rows", "broken", "arguments", "says"),
    [
        (GOOD, "", ["--config.data.columns.answer=gold"], "column 'gold' is not there"),
        ([*GOOD, {"question": "?", "answer": ""}], "", [], "line 4: no answer"),
        *slow(
            (GOOD, '{"question": "?\n', [], "line 4"),
            (GOOD, "", ["--config.eval.benchmarks=gsm8k={file}"], "has 3 problems, but GSM8K has 1319"),
            (GOOD, "", ["--config=configs/evaluate.py:qwen2.5-math", "--model={bare}"],
             "no chat template, wanted one"),
            (GOOD, "", ["--config=configs/evaluate.py:lufy"], "did you mean 'luffy'"),
            (GOOD, "", ["--config.batch_size=4"], "did you mean 'eval.batch'"),
        ),
    ],
    ids=["column", "empty answer", "broken line", "size", "template", "protocol", "field"],
)  # fmt: skip
def test_bad_input_is_one_line(rows, broken, arguments, says, tmp_path):
    given = {
        "file": write(tmp_path / "mine.jsonl", rows, broken),
        "bare": without_template(tmp_path / "bare"),
    }
    asked = [f"--workdir={tmp_path / 'out'}"]
    for flag in (f"--model={STUDENT}", "--config.eval.benchmarks=mine={file}"):
        if not any(told.startswith(flag.partition("=")[0]) for told in arguments):
            asked.append(flag)
    done = evaluate(*(text.format(**given) for text in [*arguments, *asked]))
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path):
    bad = [{"question": "?", "answer": ""}, *GOOD, {"text": "no question"}]
    file = write(tmp_path / "mine.jsonl", bad, '{"question": "?\n')
    asked = [f"--model={STUDENT}", f"--workdir={tmp_path / 'out'}", "--config.data.bad_rows=skip",
             f"--config.eval.benchmarks=mine={file}", "--config.eval.max_response_tokens=20"]  # fmt: skip
    done = evaluate(*asked)
    assert done.returncode == 0, done.stderr
    assert "mine: 3 problems x 1 answers" in done.stdout
    assert "3 rows left out" in done.stdout
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sum(report["benchmarks"]["mine"]["left_out"].values()) == 3
    # So is a broken line of the file of answers, with all after it.
    answers = tmp_path / "out" / "eval" / "mine.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(b"{broken\n" + whole.split(b"\n", 1)[1])
    done = evaluate(*asked)
    assert done.returncode == 0, done.stderr
    assert answers.read_bytes() == whole
