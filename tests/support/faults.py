"""Faults on purpose: runs in processes of their own that are killed, starved of disk, or corrupted.

    python -m tests.support.faults kills 200      SIGKILL at random moments, each run resumed to its end
    python -m tests.support.faults full 20        files that cannot grow at a random moment
    python -m tests.support.faults disk 20        a disk that fills up at a random moment (mounts one: root)
    python -m tests.support.faults short 20       the data file cut short while it is read
    python -m tests.support.faults corrupt 20     random bytes of the newest checkpoint changed
    python -m tests.support.faults soak 1000      resident memory and time of a step, over so many steps
    python -m tests.support.faults points         one kill at each named point of a step

Every disturbed run is resumed and must end as the undisturbed one did, bit for bit: parameters,
optimiser, metrics.jsonl (but for times and memory), rollouts.jsonl, eval/.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from opd_jax.data import arithmetic
from tests.support.faulty import (
    POINTS,
    SMALL,
    STEPS,
    assert_same,
    child,
    finish,
    lines_of,
    state_of,
)


def resumed_to_the_end(
    workdir: pathlib.Path, wanted: dict[str, object], base: Sequence[str] = SMALL
) -> str:
    """Resume without a fault, compare, and say what the run said."""
    status, said = finish(workdir, base=base)
    assert status == 0, said
    assert "Traceback" not in said, said
    assert_same(workdir, wanted)
    return said


def the_error(status: int, said: str) -> str:
    """The last line of a run that has failed as it should: the only one that tells of an error."""
    last = said.splitlines()[-1]
    assert status == 1, said
    assert [line for line in said.splitlines() if "rror" in line] == [last], said
    return last


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


def points(folder: pathlib.Path, names: Sequence[str] = tuple(POINTS)[:-3], count: int = 3) -> None:
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
        last = the_error(status, said)
        resumed_to_the_end(workdir, wanted)
        shutil.rmtree(workdir)
        print(f"{i + 1}/{count} full: {last}", flush=True)


@contextlib.contextmanager
def small_disk(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of its own in memory, where the caller may mount one."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def disk(folder: pathlib.Path, count: int, seed: int) -> None:
    """A disk that is full from a random call on: one line, exit status 1; with room the run goes on."""
    wanted, _ = undisturbed(folder)
    draw = random.Random(seed)
    for i in range(count):
        with small_disk(folder / f"disk-{i}") as place:
            point = draw.choice(["update", "line", "save", "seal", "evaluate"])
            # Of the first checkpoint on: before it there is no state to survive.
            turn = draw.randint(3, STEPS - 1) if point in ("update", "line") else draw.randint(2, 3)
            left = draw.choice([0, 4096, 65_536, 1_000_000])
            status, said = finish(place / "run", fault=f"fill:{point}:{turn}:{place}:{left}")
            last = the_error(status, said)
            (place / "filler").unlink()
            resumed_to_the_end(place / "run", wanted)
        print(f"{i + 1}/{count} full at {point}, {left} bytes left: {last}", flush=True)


def short(folder: pathlib.Path, count: int, seed: int) -> None:
    """The data file becomes shorter between two reads: one line that names it; put back, the run goes on."""
    file = folder / "problems.jsonl"
    rows = [arithmetic.problem("train", i) for i in range(64)]
    lines = (
        {"id": row.id, "problem": row.prompt, "solution": row.solution, "answer": row.answer}
        for row in rows
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, status = file.read_bytes(), file.stat()
    base = (*SMALL, f"--config.data.train={file}")
    finish(folder / "plain", base=base)
    wanted = state_of(folder / "plain")
    draw = random.Random(seed)
    for i in range(count):
        workdir = folder / f"short-{i}"
        cut = f"cut:read:{draw.randint(2, STEPS - 1)}:{file}:{draw.randrange(len(whole))}"
        code, said = finish(workdir, fault=cut, base=base)
        last = the_error(code, said)
        assert str(file) in last, said
        file.write_bytes(whole)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        resumed_to_the_end(workdir, wanted, base=base)
        shutil.rmtree(workdir)
        print(f"{i + 1}/{count} {cut.split(':')[2]}: {last}", flush=True)


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
    rows = lines_of(workdir / "metrics.jsonl")
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", choices=["kills", "points", "full", "disk", "short", "corrupt", "soak"]
    )
    parser.add_argument("count", type=int, nargs="?", default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder to work in, not removed")
    given = parser.parse_args()
    folder = pathlib.Path(given.keep or tempfile.mkdtemp(prefix="opd_jax_faults_"))
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    work: dict[str, Callable[[], None]] = {
        "kills": lambda: kills(folder, given.count, given.seed),
        "points": lambda: points(folder),
        "full": lambda: full(folder, given.count, given.seed),
        "disk": lambda: disk(folder, given.count, given.seed),
        "short": lambda: short(folder, given.count, given.seed),
        "corrupt": lambda: corrupt(folder, given.count, given.seed),
        "soak": lambda: soak(folder, given.count),
    }
    work[given.what]()
    if not given.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
