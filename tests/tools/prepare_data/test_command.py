"""launch/prepare_data.py from a shell."""

import json
import subprocess
import sys

import pytest

from tests.support.lanes import slow
from tests.support.paths import ROOT


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare_data.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--config.filter.max_tokns=5"], 1, "did you mean 'filter.max_tokens'"),
        (["--config.data.train=none.jsonl"], 1, "none.jsonl does not exist"),
        *slow(
            (["--config.filter.max_tokens=many"], 1, "type int"),
            (["--config=configs/prepare_data.py:openr1"], 1, "did you mean 'openr1-math'"),
            (["--config.seed=0"], 1, "data.train='', wanted the file to prepare"),
            (["--config.steps=5"], 1, "config.steps is not a field"),  # it is one of train.py's
            (["--uot=x"], 2, "uot"),
        ),
    ],
)
def test_mistakes_are_one_line(arguments, status, says, tmp_path):
    completed = command(*arguments, f"--out={tmp_path}/out")
    assert completed.returncode == status, completed.stderr
    (line,) = completed.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(tmp_path, train):
    out = tmp_path / "out"
    completed = command(f"--config.data.train={train}", f"--out={out}")
    assert completed.returncode == 0, completed.stderr
    assert "kept                                   5\n" in completed.stdout
    assert json.loads((out / "report.json").read_text())["kept"] == 5
    missing = command(f"--config.data.train={train}")
    assert missing.returncode == 1
    assert missing.stderr == "error: --out is missing; give a folder for the result: --out=DIR\n"
