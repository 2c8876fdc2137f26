"""launch/plan.py: what fits exits 0, what does not exits 1 with one line that says what to set."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def plan(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "plan.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_papers_large_student_on_four_h200():
    recipe = "qwen2.5-math-7b,teacher=openthinker3-7b"
    done = plan(f"--config=configs/stable_opd.py:{recipe}", "--devices=4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["usable_bytes"] == 0.92 * 139 * 2**30
    # The state of 7.616 billion parameters, 12 bytes each, over four devices.
    state = found["stages"]["update"]["master"] + found["stages"]["update"]["optimizer"]
    assert round(state / 2**30, 1) == round(12 * 7.615616512e9 / 4 / 2**30, 1)
    assert found["step"]["longest"]["tokens"] == 256 * 8192


def test_what_does_not_fit_says_what_to_set():
    recipe = "qwen2.5-math-1.5b"
    done = plan(f"--config=configs/stable_opd.py:{recipe}", "--device_kind=h100")
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    flags = lines[0].rpartition("; set ")[2].split()
    assert all(flag.startswith("--config.") for flag in flags)
    again = plan(f"--config=configs/stable_opd.py:{recipe}", "--device_kind=h100", *flags)
    assert again.returncode == 0, again.stderr


def test_verifying_wants_as_many_devices():
    done = plan("--verify", "--devices=2", "--device_kind=cpu")
    assert done.returncode == 1
    assert "set XLA_FLAGS=--xla_force_host_platform_device_count=2" in done.stderr
