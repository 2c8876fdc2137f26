"""Whether a checkpoint on the disk is what was written: sizes and CRC-32 of its files, kept inside it.

Orbax and OCDBT say when a checkpoint is complete (a folder that is renamed last); not that a byte of
its arrays has changed since, or that files are missing.
"""

import json
import os
import pathlib
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

from opd_jax.errors import WorkdirError
from opd_jax.sharding import multihost
from opd_jax.workdir import atomic

MANIFEST = "manifest.json"
ASIDE = "set_aside"
_LEFT = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax does not take for checkpoints
_ORBAX = "_CHECKPOINT_METADATA"  # written once more after all else is complete
_CHUNK = 1 << 22
_SPARE = 32 << 20  # bytes beside the arrays: metadata, logs
GIB = 2**30


def seal(folder: pathlib.Path) -> None:
    """Write the manifest of a folder whose files will not change any more."""
    names = _files(folder)
    with ThreadPoolExecutor(max_workers=4) as pool:
        sums = list(pool.map(lambda name: _sum(folder / name), names))
    atomic.write_json(folder / MANIFEST, dict(zip(names, sums, strict=True)))


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's folder, None where nothing is. Reads all of it."""
    if not _is_json(folder / _ORBAX):
        return f"{_ORBAX} cannot be read"
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"{MANIFEST} missing"
    try:
        wanted = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (int(size), str(check)) for name, (size, check) in wanted.items()}
    except (ValueError, OverflowError, TypeError, AttributeError, OSError, RecursionError):
        return f"{MANIFEST} cannot be read"
    present = set(_files(folder))
    for name in expected:
        if name not in present:  # so that no name leads outside
            return f"{name} missing"
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(lambda name: _found(folder / name), expected))
    for name, one in zip(expected, found, strict=True):
        if one != expected[name]:
            return f"{name} is not what was written"
    return None


def newest(workdir: pathlib.Path) -> tuple[int | None, list[str]]:
    """The newest checkpoint that is whole, None where there is none; and lines about those that are not,
    which are moved to WORKDIR/set_aside/. Of several processes the first looks."""
    step, lines = multihost.from_first(lambda: _newest(workdir))
    return step, lines


def _newest(workdir: pathlib.Path) -> tuple[int | None, list[str]]:
    folder = workdir / "checkpoints"
    lines: list[str] = []
    for step in sorted(steps(folder), reverse=True):
        wrong = damage(folder / str(step))
        if wrong is None:
            return step, lines
        place = _aside(workdir, step)
        (folder / str(step)).rename(place)
        lines.append(f"warning: checkpoint {step} is damaged ({wrong}); set aside as {place}")
    return None, lines


def steps(folder: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder of them."""
    if not folder.is_dir():
        return []
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdecimal() and f.is_dir())


def remove(folder: pathlib.Path, step: int) -> None:
    """Delete a checkpoint: at once by its name, so that no half of one is ever taken for a whole one."""
    leaving = folder / f"{step}{_LEFT}-removed"
    shutil.rmtree(leaving, ignore_errors=True)
    (folder / str(step)).rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def clear(folder: pathlib.Path) -> None:
    """Remove what a killed process had begun to write, or to delete."""
    if folder.is_dir():
        for left in folder.glob(f"*{_LEFT}*"):
            shutil.rmtree(left, ignore_errors=True)


def unfinished(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
    """The folder that Orbax is writing a step into, if it is there."""
    return list(folder.glob(f"{step}{_LEFT}*"))


def require_room(workdir: pathlib.Path, size: int, copies: int, *, what: str) -> None:
    """Raise WorkdirError where the disk has no room for so many checkpoints of `size` bytes."""
    needed = copies * size + _SPARE
    free = multihost.from_first(lambda: free_bytes(workdir))
    if free < needed:
        raise WorkdirError(
            f"{what} needs {needed / GIB:.2f} GiB ({copies} of {size / GIB:.2f}, and {_SPARE / GIB:.2f} to "
            f"spare), and the disk of {str(workdir)!r} has {free / GIB:.2f} free; make room, or give a "
            "--workdir elsewhere"
        )


def free_bytes(path: pathlib.Path) -> int:
    """What the disk of a path, which need not exist yet, has free."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _aside(workdir: pathlib.Path, step: int) -> pathlib.Path:
    (workdir / ASIDE).mkdir(exist_ok=True)
    number = 1
    while (place := workdir / ASIDE / f"checkpoint-{step}-{number}").exists():
        number += 1
    return place


def _files(folder: pathlib.Path) -> list[str]:
    """All but the manifest and what Orbax changes last, as paths inside of the folder."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [str((pathlib.Path(parent) / name).relative_to(folder)) for name in names]
    return sorted(name for name in found if name not in (MANIFEST, _ORBAX))


def _sum(path: pathlib.Path) -> tuple[int, str]:
    """Bytes of a file and their CRC-32."""
    size = check = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            check = zlib.crc32(chunk, check)  # lets other threads go on meanwhile
    return size, f"{check:08x}"


def _found(path: pathlib.Path) -> tuple[int, str] | None:
    try:
        return _sum(path)
    except OSError:
        return None


def _is_json(path: pathlib.Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return False
    return True
