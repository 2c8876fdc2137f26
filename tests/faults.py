"""Faults on purpose: runs in processes of their own that are killed, starved of disk, or corrupted.

    python -m tests.faults kills 200      SIGKILL at random moments, each run resumed to its end
    python -m tests.faults full 20        files that cannot grow at a random moment: a disk that is full
    python -m tests.faults corrupt 20     random bytes of the newest checkpoint changed
    python -m tests.faults soak 1000      resident memory and time of a step, over so many steps
    python -m tests.faults points         one kill at each named point of a step

Every disturbed run is resumed and must end as the undisturbed one did, bit for bit: parameters,
optimiser, metrics.jsonl (but for times and memory), rollouts.jsonl, eval/.

A child is this file again (`python -m tests.faults child ...`): launch/train.py with one function
replaced, so that nothing in opd_jax knows of faults.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import pkgutil
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from configs import sft

ROOT = pathlib.Path(__file__).parents[1]
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
STEPS = 8
# Where a child may be killed: a function of opd_jax, before it is called for the n-th time.
POINTS = {
    "rollout": "opd_jax.collect.Collector._rollout",
    "score": "opd_jax.collect.Collector._score",
    "update": "opd_jax.stepping.Stepper._update",
    "evaluate": "opd_jax.held_out.HeldOut.evaluate",
    "evaluated": "opd_jax.held_out.HeldOut.keep_best",
    "line": "opd_jax.workdir.Lines.write",
    "save": "opd_jax.checkpoint.Checkpoints.save",
    "seal": "opd_jax.checkpoint.Checkpoints._seal",
    "remove": "opd_jax.intact.remove",
    "read": "opd_jax.setup.Setup.read",
    "restore": "opd_jax.checkpoint.Checkpoints.restore",
    "start": "opd_jax.workdir.create",
}


def child(
    workdir: pathlib.Path, *more: str, fault: str = "", base: Sequence[str] = SMALL
) -> subprocess.Popen:
    """launch/train.py in a process, with a fault: KIND:POINT:COUNT[:SIZE]."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    command = [sys.executable, "-m", "tests.faults", "child", fault]
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
    elif (
        kind == "full"
    ):  # no file grows past SIZE bytes from now on: as a full disk, EFBIG for ENOSPC
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = int(rest[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
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
        "metrics": [_untimed(row) for row in _lines(workdir / "metrics.jsonl")],
        "rollouts": _lines(workdir / "rollouts.jsonl"), "evals": evals,
        "best": json.loads((workdir / "best" / "best.json").read_text()),
    }  # fmt: skip


def _leaves(tree: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(tree, dict):
        return [x for name in sorted(tree) for x in _leaves(tree[name], f"{path}/{name}")]
    if isinstance(tree, list | tuple):
        return [x for i, one in enumerate(tree) for x in _leaves(one, f"{path}/{i}")]
    return [] if tree is None else [(path, tree)]


def _lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _untimed(row: dict) -> dict:
    drop = ("time/", "speed/", "memory/")
    return {name: value for name, value in row.items() if not name.startswith(drop)}


def assert_same(workdir: pathlib.Path, wanted: dict[str, object]) -> None:
    """The run in `workdir` ended as `state_of` another says."""
    got = state_of(workdir)
    for name, value in wanted.items():
        assert got[name] == value, f"{workdir}: {name} differs"


def resumed_to_the_end(workdir: pathlib.Path, wanted: dict[str, object], *more: str) -> str:
    """Resume without a fault, compare, and say what the run said."""
    status, said = finish(workdir, *more)
    assert status == 0, said
    assert "Traceback" not in said, said
    assert_same(workdir, wanted)
    return said


def undisturbed(folder: pathlib.Path) -> tuple[dict[str, object], float]:
    """What a run that nothing happens to ends with, and the seconds it takes with programs at hand."""
    finish(folder / "warm")  # compiles
    began = time.monotonic()
    status, said = finish(folder / "plain")
    assert status == 0, said
    return state_of(folder / "plain"), time.monotonic() - began


def kills(folder: pathlib.Path, count: int, seed: int) -> None:
    """SIGKILL at random moments, now and then again during the resume; every run comes to its end."""
    wanted, seconds = undisturbed(folder)
    draw = random.Random(seed)
    done = 0
    while done < count:
        workdir = folder / f"kill-{done}"
        moments = [
            draw.triangular(0.1, seconds, seconds)
        ]  # most of them late: a start is little work
        while draw.random() < 0.3:
            moments.append(draw.uniform(0.1, seconds))
        for moment in moments:
            process = child(workdir)
            try:
                process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
        resumed_to_the_end(workdir, wanted)
        shutil.rmtree(workdir)
        print(f"{done}/{count} kills, the last at {moments[-1]:.2f} s: as undisturbed", flush=True)


def points(folder: pathlib.Path, names: Sequence[str] = tuple(POINTS), count: int = 3) -> None:
    """A kill at the `count`-th call of each named point, or of the resume's first."""
    wanted, _ = undisturbed(folder)
    for name in names:
        workdir = folder / name
        turns = 1 if name in ("restore", "start", "remove") else count
        if name == "restore":
            status, _ = finish(workdir, fault="kill:update:5")
            assert status == -signal.SIGKILL
        status, said = finish(workdir, fault=f"kill:{name}:{turns}")
        assert status == -signal.SIGKILL, said
        resumed_to_the_end(workdir, wanted)
        print(f"killed at {name}: as undisturbed", flush=True)


def full(folder: pathlib.Path, count: int, seed: int) -> None:
    """From a random call on no file grows past a random size; the run ends in one line, and goes on later."""
    wanted, _ = undisturbed(folder)
    draw = random.Random(seed)
    for i in range(count):
        workdir = folder / f"full-{i}"
        size = draw.choice([10_000, 100_000, 1_000_000])
        status, said = finish(workdir, fault=f"full:update:{draw.randint(1, STEPS - 1)}:{size}")
        assert status == 1, said
        assert [line for line in said.splitlines() if "rror" in line] == [said.splitlines()[-1]], (
            said
        )
        resumed_to_the_end(workdir, wanted)
        shutil.rmtree(workdir)
        print(f"{i + 1}/{count} full: {said.splitlines()[-1]}", flush=True)


def corrupt(folder: pathlib.Path, count: int, seed: int) -> None:
    """Bytes of a random file of the newest checkpoint changed, cut off or gone: the one before serves."""
    wanted, _ = undisturbed(folder)
    draw = random.Random(seed)
    for i in range(count):
        workdir = folder / f"corrupt-{i}"
        shutil.copytree(folder / "plain", workdir)
        what = spoil(workdir / "checkpoints" / str(STEPS), draw)
        said = resumed_to_the_end(workdir, wanted)
        assert f"warning: checkpoint {STEPS} is damaged" in said, said
        shutil.rmtree(workdir)
        print(f"{i + 1}/{count} {what}: as undisturbed", flush=True)


def spoil(checkpoint: pathlib.Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint; says how."""
    files = sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.stat().st_size)
    file = draw.choice(files)
    size = file.stat().st_size
    how = draw.choice(["changed", "cut", "gone"])
    if file.name == "_CHECKPOINT_METADATA" and how == "changed":
        how = "cut"  # a changed time in it does no harm, and is not looked at
    if how == "gone":
        file.unlink()
    elif how == "cut":
        os.truncate(file, draw.randrange(size))
    else:
        place = draw.randrange(size)
        with file.open("rb+") as out:
            out.seek(place)
            byte = out.read(1)[0]
            out.seek(place)
            out.write(bytes([byte ^ draw.randint(1, 255)]))
    return f"{file.relative_to(checkpoint)} {how}"


def soak(folder: pathlib.Path, steps: int) -> None:
    """Memory, threads, open files and the time of a step, early and late in a long run."""
    workdir = folder / "soak"
    process = child(
        workdir, f"--config.steps={steps}", "--config.checkpoint.every=50",
        "--config.eval.every=100",
    )  # fmt: skip
    seen: list[tuple[int, float, int, int]] = []
    while process.poll() is None:
        time.sleep(1)
        if look := _look(process.pid, workdir):
            seen.append(look)
    assert process.returncode == 0, process.communicate()[0]
    rows = _lines(workdir / "metrics.jsonl")
    took = [row["time/step_s"] for row in rows[1:]]
    half = [one for one in seen if one[0] >= steps // 2]
    n = max(len(half) // 5, 1)
    start, end = (statistics.median(x[1] for x in part) for part in (half[:n], half[-n:]))
    threads, files = ([min(x[i] for x in half), max(x[i] for x in half)] for i in (2, 3))
    early, late = (
        statistics.median(took[a:b])
        for a, b in ((steps // 2, steps // 2 + steps // 10), (-steps // 10, None))
    )
    print(
        f"{steps} steps: resident {start:.1f} MiB after half of them, {end:.1f} at the end "
        f"({100 * (end / start - 1):+.2f} %); a step {early * 1e3:.1f} ms, then {late * 1e3:.1f} ms "
        f"({100 * (late / early - 1):+.1f} %); threads {threads}, open files {files}",
        flush=True,
    )


def _look(pid: int, workdir: pathlib.Path) -> tuple[int, float, int, int] | None:
    """(steps done, resident MiB, threads, open files) of a process now."""
    try:
        step = sum(1 for _ in (workdir / "metrics.jsonl").open()) - 1
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return step, int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), files
    except (OSError, KeyError):
        return None


def main() -> None:
    """See the top of the file."""
    if sys.argv[1:2] == ["child"]:
        fault, sys.argv = sys.argv[2], ["launch/train.py", *sys.argv[3:]]
        _child(fault)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "points", "full", "corrupt", "soak"])
    parser.add_argument("count", type=int, nargs="?", default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder to work in, not removed")
    given = parser.parse_args()
    folder = pathlib.Path(given.keep or tempfile.mkdtemp(prefix="opd_jax_faults_"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    work: dict[str, Callable[[], None]] = {
        "kills": lambda: kills(folder, given.count, given.seed),
        "points": lambda: points(folder),
        "full": lambda: full(folder, given.count, given.seed),
        "corrupt": lambda: corrupt(folder, given.count, given.seed),
        "soak": lambda: soak(folder, given.count),
    }
    work[given.what]()
    if not given.keep:
        shutil.rmtree(folder)


def _child(fault: str) -> None:
    os.environ.setdefault("GLIBC_TUNABLES", "")  # no second start of the process
    from launch import train as command
    from opd_jax import cli

    if fault:
        _inject(fault)
    cli.main(command.main, stops=True)


if __name__ == "__main__":
    main()
