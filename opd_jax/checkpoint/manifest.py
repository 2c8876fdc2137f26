"""Integrity of checkpoints on the disk: sizes and CRC-32 of all files, in a manifest inside each.

Orbax and OCDBT show whether a checkpoint is complete (the folder is renamed last), but not whether a byte
of its arrays has changed since then, or whether files are missing.
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
_PARTIAL = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax ignores
_ORBAX = "_CHECKPOINT_METADATA"  # written again after everything else is complete
_CHUNK = 1 << 22
_SPARE = 32 << 20  # bytes needed in addition to the arrays, for metadata and logs
GIB = 2**30


def seal(folder: pathlib.Path) -> None:
    """Write the manifest of a folder whose files will not change any more."""
    names = _files(folder)
    with ThreadPoolExecutor(max_workers=4) as pool:
        sums = list(pool.map(lambda name: _sum(folder / name), names))
    atomic.write_json(folder / MANIFEST, dict(zip(names, sums, strict=True)))


def damage(folder: pathlib.Path) -> str | None:
    """Return what is wrong with a checkpoint's folder, None where nothing is. Reads all of its files."""
    if not _is_json(folder / _ORBAX):
        return f"{_ORBAX} cannot be read"
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"{MANIFEST} missing"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (int(size), str(check)) for name, (size, check) in entries.items()}
    except (ValueError, OverflowError, TypeError, AttributeError, OSError, RecursionError):
        return f"{MANIFEST} cannot be read"
    present = set(_files(folder))
    for name in expected:
        if name not in present:  # also refuses names that lead out of the folder
            return f"{name} missing"
    with ThreadPoolExecutor(max_workers=4) as pool:
        actual = list(pool.map(lambda name: _sum_or_none(folder / name), expected))
    for name, size_and_sum in zip(expected, actual, strict=True):
        if size_and_sum != expected[name]:
            return f"{name} has changed since it was written"
    return None


def newest(workdir: pathlib.Path) -> tuple[int | None, list[str]]:
    """Return the newest intact checkpoint, None where there is none, and lines about damaged ones.

    Damaged ones are moved to WORKDIR/set_aside/. With several processes, process 0 checks them.
    """
    step, lines = multihost.from_first(lambda: _newest(workdir))
    return step, lines


def _newest(workdir: pathlib.Path) -> tuple[int | None, list[str]]:
    folder = workdir / "checkpoints"
    lines: list[str] = []
    for step in sorted(steps(folder), reverse=True):
        reason = damage(folder / str(step))
        if reason is None:
            return step, lines
        place = _aside(workdir, step)
        (folder / str(step)).rename(place)
        lines.append(f"warning: checkpoint {step} is damaged ({reason}); moved to {place}")
    return None, lines


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder of checkpoints."""
    if not folder.is_dir():
        return []
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdecimal() and f.is_dir())


def remove(folder: pathlib.Path, step: int) -> None:
    """Delete a checkpoint; it is renamed first, so that a partial one never counts as complete."""
    leaving = folder / f"{step}{_PARTIAL}-removed"
    shutil.rmtree(leaving, ignore_errors=True)
    (folder / str(step)).rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def clear(folder: pathlib.Path) -> None:
    """Remove partial checkpoints that a killed process was writing or deleting."""
    if folder.is_dir():
        for left in folder.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)


def unfinished(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
    """Return the folder that Orbax is writing a step into, if it exists."""
    return list(folder.glob(f"{step}{_PARTIAL}*"))


def require_room(workdir: pathlib.Path, size: int, copies: int, *, what: str) -> None:
    """Raise WorkdirError where the disk has no room for `copies` checkpoints of `size` bytes."""
    needed = copies * size + _SPARE
    free = multihost.from_first(lambda: free_bytes(workdir))
    if free < needed:
        raise WorkdirError(
            f"{what} needs {needed / GIB:.2f} GiB ({copies} x {size / GIB:.2f}, and {_SPARE / GIB:.2f} "
            f"spare), but the disk of {str(workdir)!r} has {free / GIB:.2f} free; make room, or set "
            "--workdir to a folder on another disk"
        )


def free_bytes(path: pathlib.Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist yet."""
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
    """List all files but the manifest and the one that Orbax changes last, as paths inside the folder."""
    paths = []
    for parent, _, names in os.walk(folder):
        paths += [str((pathlib.Path(parent) / name).relative_to(folder)) for name in names]
    return sorted(path for path in paths if path not in (MANIFEST, _ORBAX))


def _sum(path: pathlib.Path) -> tuple[int, str]:
    """Return the size of a file in bytes and its CRC-32."""
    size = check = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            check = zlib.crc32(chunk, check)  # releases the GIL
    return size, f"{check:08x}"


def _sum_or_none(path: pathlib.Path) -> tuple[int, str] | None:
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
