"""The command line: a user's mistake costs one line, status 1, and nothing on disk."""

import os
import pathlib
import subprocess
import sys

import pytest

from opd_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


def train(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--config.rollout.temprature=1"], 1, "did you mean 'rollout.temperature'"),
        (["--config.rollout.temperature=hot"], 1, "type float"),
        (["--config=configs/stable_opd.py:tyni"], 1, "did you mean 'tiny'"),
        (["--config=configs/nothing.py"], 1, "configs/nothing.py"),
        (["--config.student.path=/nowhere"], 1, "model folder '/nowhere' does not exist"),
        (["--config.optim.updates_per_rollout=3"], 1, "--config.rollout.prompts_per_step=18"),
        (["--config.rollout.max_prompt_tokens=5"], 1, "--config.rollout.max_prompt_tokens="),
        (["--config.optim.lr=1"], 1, "did you mean 'optim.learning_rate'"),
        (["--config.steps=1", "--config=configs/opd.py"], 1, "put --config=FILE first"),
        (["--wrkdir=x"], 2, "wrkdir"),
        (["--lr=1"], 2, "--config.FIELD=VALUE: did you mean 'optim.learning_rate'"),
        (["extra"], 2, "extra"),
    ],
)
def test_mistakes_are_one_line(arguments, status, says, tmp_path):
    workdir = tmp_path / "run"
    config = [] if "--config=" in " ".join(arguments) else ["--config=configs/stable_opd.py"]
    done = train(*config, *arguments, f"--workdir={workdir}")
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not workdir.exists()


def test_help_and_another_working_directory(tmp_path):
    """Entry points run from anywhere: the config path is relative to where one stands."""
    done = train(
        f"--config={ROOT}/configs/opd.py", "--config.steps=0", f"--workdir={tmp_path}/run",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "steps=0" in done.stderr


def test_a_wrong_field_of_the_default_config_is_one_line():
    """absl applies overrides of a default file when the flag is defined, before any parsing."""
    done = train("--config.rollout.temprature=1")
    assert done.returncode == 1
    assert done.stderr == (
        "error: config.rollout.temprature is not a field; did you mean 'rollout.temperature'?\n"
    )


@pytest.mark.parametrize("told", [None, "elsewhere"])
def test_compiled_programs_are_kept_between_runs(told, tmp_path):
    """In the user's cache folder, or where JAX's own variable says."""
    code = (
        "from opd_jax import cli; cli._keep_programs(); import jax; import jax.numpy as jnp; "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64))).block_until_ready()"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path)}
    if told:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / told)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env, timeout=120)
    folder = tmp_path / (told or "opd_jax/programs")
    assert any(folder.iterdir())
    assert [x.name for x in tmp_path.iterdir()] == [told or "opd_jax"]


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("told", [None, "glibc.malloc.check=0"])
def test_the_allocator_is_set_unless_told_otherwise(told, tmp_path):
    """The command starts itself again: once, with the same arguments, in the same process."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import os, sys\n"
        "from opd_jax import cli\n"
        "cli.main(lambda: print(os.getpid(), os.environ['GLIBC_TUNABLES'], *sys.argv[1:]), names=())\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"GLIBC_TUNABLES": told} if told else {})
    started = subprocess.Popen(
        [sys.executable, str(script), "--stderrthreshold=info"],
        stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    out, _ = started.communicate(timeout=120)
    assert out.split() == [
        str(started.pid), told or cli.ALLOCATOR, "--stderrthreshold=info"
    ]  # fmt: skip
