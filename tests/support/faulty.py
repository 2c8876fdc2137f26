"""launch/train.py in a process, with one function replaced by one that fails (opd_jax knows of no faults).

python -m tests.support.faulty kill:update:3 --config=...    killed before its third update
"""

import functools
import hashlib
import json
import os
import pathlib
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import sft
from tests.support.paths import ROOT

# tiny, with so few and short rollouts that a step takes a fraction of a second.
SMALL = (
    "--config=configs/stable_opd.py:tiny", "--config.rollout.prompts_per_step=2",
    "--config.rollout.samples_per_prompt=2", "--config.rollout.max_response_tokens=80",
    "--config.data.size=64", "--config.data.bad_rows=skip", "--config.eval.problems=4",
    "--config.eval.teacher=False", "--config.eval.every=3", "--config.checkpoint.every=2",
    "--config.log.gradients=2", "--config.optim.microbatch_tokens=400", "--config.eval.best=length_mean",
)  # fmt: skip
# The same without rollouts, which has little to compile.
QUICK = ("--config=configs/sft.py:tiny", *SMALL[1:])
# The same with what changes in the course of a run: budgets that rise, jumps, plans for the teacher.
CHANGING = (
    *SMALL, "--config.rollout.horizon=20,40", "--config.rollout.horizon_steps=2",
    "--config.jump.problems=4", "--config.jump.candidates=1", "--config.harness.prompt={problem}",
    "--config.harness.max_tokens=8", "--config.harness.max_prompt_tokens=64",
    "--config.data.teacher_prompt_template={problem} {plan}",
)  # fmt: skip
STEPS = 8
# Where a child may be killed: a function of opd_jax, before it is called for the n-th time.
POINTS = {
    "rollout": "opd_jax.training.step_functions.StepFunctions.generate",
    "score": "opd_jax.training.step_functions.StepFunctions.score",
    "update": "opd_jax.training.step.Step._start_updates",
    "evaluate": "opd_jax.evaluation.held_out.HeldOut.evaluate",
    "evaluated": "opd_jax.evaluation.held_out.HeldOut.keep_best",
    "line": "opd_jax.workdir.jsonl.Lines.write",
    "save": "opd_jax.checkpoint.checkpoint.Checkpoints.save",
    "seal": "opd_jax.checkpoint.checkpoint.Checkpoints._seal",
    "remove": "opd_jax.checkpoint.manifest.remove",
    "read": "opd_jax.training.setup.Setup.read",
    "restore": "opd_jax.checkpoint.checkpoint.Checkpoints.restore",
    "start": "opd_jax.workdir.create",
    # Of runs with `CHANGING` alone.
    "horizon": "opd_jax.training.horizon.observe",
    "jump": "opd_jax.training.jump.Jumps._accuracy",
    "harness": "opd_jax.training.step_functions.StepFunctions.write",
}


def child(
    workdir: pathlib.Path, *more: str, fault: str = "", base: Sequence[str] = SMALL
) -> subprocess.Popen:
    """launch/train.py in a process, with a fault: KIND:POINT:COUNT[:SIZE]."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    command = [sys.executable, "-m", "tests.support.faulty", fault]
    arguments = [*base, f"--config.steps={STEPS}", f"--workdir={workdir}", *more]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def config(steps: int = STEPS) -> ConfigDict:
    """What `QUICK` makes of its config file."""
    made = sft.get_config("tiny")
    for argument in QUICK[1:]:
        name, _, text = argument.removeprefix("--config.").partition("=")
        old = functools.reduce(lambda tree, part: tree[part], name.split("."), made)
        new = text == "True" if isinstance(old, bool) else type(old)(text)
        made.update_from_flattened_dict({name: new})
    made.steps = steps
    return made


def finish(
    workdir: pathlib.Path, *more: str, fault: str = "", base: Sequence[str] = SMALL
) -> tuple[int, str]:
    """(exit status, what it said) of a child."""
    process = child(workdir, *more, fault=fault, base=base)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def _inject(fault: str) -> None:
    """In the child: replace the function of a point by one that fails at its n-th call."""
    kind, point, count, *rest = fault.split(":")
    place, _, name = POINTS[point].rpartition(".")
    owner = pkgutil.resolve_name(place)
    original = getattr(owner, name)
    left = int(count)

    @functools.wraps(original)
    def replaced(*args: object, **kwargs: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            _happen(kind, rest)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _happen(kind: str, rest: Sequence[str]) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # the thread that hears it
    elif kind == "full":  # no file grows past SIZE bytes from now on: EFBIG for ENOSPC
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = int(rest[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    elif kind == "fill":  # all but SIZE bytes of a disk
        place, left = rest
        free = shutil.disk_usage(place).free - int(left)
        with (pathlib.Path(place) / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, max(free, 1))
    elif kind == "cut":  # a file, to SIZE bytes
        os.truncate(rest[0], int(rest[1]))
    elif kind == "raise":
        raise OSError(int(rest[0]), os.strerror(int(rest[0])))
    elif kind == "oom":
        import jax

        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789 bytes."
        )
    else:
        raise AssertionError(kind)


def state_of(workdir: pathlib.Path) -> dict[str, object]:
    """All that two equal runs have in common: digests of the last checkpoint's arrays, and the lines."""
    import numpy as np
    import orbax.checkpoint as ocp

    folder = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as found:
        step = found.latest_step()
        restored = found.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(), guard=ocp.args.JsonRestore()),
        )
    digests = {}
    for path, leaf in _leaves(restored["state"]):
        digests[path] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    evals = {
        str(file.relative_to(workdir)): file.read_text()
        for file in sorted((workdir / "eval").rglob("*.json*"))
    }
    return {
        "step": step, "arrays": digests, "guard": restored["guard"],
        "metrics": [_untimed(row) for row in lines_of(workdir / "metrics.jsonl")],
        "rollouts": lines_of(workdir / "rollouts.jsonl"), "evals": evals,
        "best": json.loads((workdir / "best" / "best.json").read_text()),
    }  # fmt: skip


def _leaves(tree: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(tree, dict):
        return [x for name in sorted(tree) for x in _leaves(tree[name], f"{path}/{name}")]
    if isinstance(tree, list | tuple):
        return [x for i, one in enumerate(tree) for x in _leaves(one, f"{path}/{i}")]
    return [] if tree is None else [(path, tree)]


def lines_of(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _untimed(row: dict) -> dict:
    drop = ("time/", "speed/", "memory/")
    return {name: value for name, value in row.items() if not name.startswith(drop)}


def assert_same(workdir: pathlib.Path, wanted: dict[str, object]) -> None:
    """The run in `workdir` ended as `state_of` another says."""
    got = state_of(workdir)
    for name, value in wanted.items():
        assert got[name] == value, f"{workdir}: {name} differs"


def main() -> None:
    """The child: the fault, then the arguments of launch/train.py."""
    fault, sys.argv = sys.argv[1], ["launch/train.py", *sys.argv[2:]]
    from launch import train as command
    from opd_jax import cli

    if fault:
        _inject(fault)
    cli.main(command.main, stops=True)


if __name__ == "__main__":
    main()
