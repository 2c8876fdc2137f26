"""launch/cluster/: the sbatch file with a fake srun and sbatch, and what the Dockerfile names."""

import os
import re
import subprocess

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.short
SBATCH = ROOT / "launch/cluster/train.sbatch"
DOCKERFILE = ROOT / "launch/cluster/Dockerfile"


@pytest.fixture
def submit(tmp_path):
    """Run the job's own part; `srun` ends with `status` and both commands record their arguments."""

    def run(*arguments: str, status: int = 0) -> tuple[int, list[str], dict[str, str], str]:
        calls = tmp_path / "calls"
        for name, code in (("srun", status), ("sbatch", 0)):
            file = tmp_path / name
            file.write_text(
                f'#!/bin/sh\necho "{name} $*" >> {calls}\nenv > {tmp_path}/env\nexit {code}\n'
            )
            file.chmod(0o755)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OPD_PYTHON": "/bin/python"}
        env["OPD_SHARE"] = "/shared"
        done = subprocess.run(
            ["bash", str(SBATCH), *arguments],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
        )
        said = calls.read_text().splitlines() if calls.exists() else []
        lines = (tmp_path / "env").read_text().splitlines() if said else []
        environment = dict(line.split("=", 1) for line in lines if "=" in line)
        return done.returncode, said, environment, done.stderr

    return run


def test_the_job_is_valid_shell():
    done = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_job_runs_one_training_command(submit):
    status, calls, environment, _ = submit(
        "--config=configs/opd.py:tiny", "--workdir=/shared/runs/a"
    )
    assert status == 0
    (call,) = calls
    assert re.fullmatch(
        r"srun --kill-on-bad-exit=0 \S*python launch/train.py --config.watchdog.action=end "
        r"--config=configs/opd.py:tiny --workdir=/shared/runs/a",
        call,
    )
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/shared/.cache/programs"
    assert environment["JAX_OPTIMIZATION_LEVEL"] == "O1"


def test_a_job_that_was_stopped_submits_itself_again(submit):
    status, calls, _, _ = submit("--config=configs/opd.py:tiny", "--workdir=/shared/a", status=75)
    assert status == 75
    assert len(calls) == 2
    assert calls[1] == f"sbatch {SBATCH} --config=configs/opd.py:tiny --workdir=/shared/a"


@pytest.mark.parametrize("failure", [1, 2, 137])
def test_a_job_that_failed_does_not(submit, failure):
    status, calls, _, _ = submit("--workdir=/shared/a", status=failure)
    assert status == failure
    assert len(calls) == 1


def test_a_job_without_a_workdir_is_refused(submit):
    """It would start from nothing each time it submits itself."""
    status, calls, _, said = submit("--config=configs/opd.py:tiny")
    assert status == 2
    assert not calls
    assert said.count("\n") == 1
    assert "error: --workdir=DIR is missing" in said


def test_the_job_asks_for_one_task_a_gpu():
    text = SBATCH.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options  # JAX then asks for a GPU that the task does not see
    assert options["signal"] == "TERM@120"  # SLURM signals srun's tasks, not the shell
    assert options["open-mode"] == "append"


def test_the_image_keeps_nvidias_jax():
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG IMAGE=nvcr\.io/nvidia/jax:\d\d\.\d\d-py3$", text, re.MULTILINE)
    assert "[cuda]" not in text  # it would replace the image's JAX
    (command,) = re.findall(r'python -c "(.+)"', text)
    done = subprocess.run(
        ["python", "-c", "import sys; compile(sys.argv[1], 'check', 'exec')", command],
        capture_output=True,
    )
    assert done.returncode == 0
