"""The tensors of a folder's safetensors files: opened, checked, and read a slice at a time.

Files are opened once and read by plain file reads into a buffer of CHUNK bytes. They are not
mapped: mapped pages would count as the process's memory until the file is closed, and a load
would hold the checkpoint twice.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from opd_jax.errors import ModelError
from opd_jax.models.json_fields import Json, show

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
CHUNK = 1 << 24  # bytes of a file in memory at one time


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of an open file: the offset of its bytes, its shape, and its dtype as the file names it."""

    name: str
    path: pathlib.Path
    file: BinaryIO
    begin: int
    shape: tuple[int, ...]
    stored: str  # "BF16"

    @property
    def dtype(self) -> np.dtype:
        """Its NumPy dtype. Raises ModelError for a dtype that is not supported for weights."""
        if self.stored not in FLOATS:
            raise ModelError(
                f"{self.path}: {self.name} has dtype {self.stored}, wanted one of "
                f"{', '.join(FLOATS)}; use a checkpoint that is not quantised"
            )
        return FLOATS[self.stored]

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fill `out` with the slice `index` of the tensor, converting to the dtype of `out`.

        Raises ModelError: the file ends early, or a number is not finite, before or after.
        """
        start, stop, _ = index[0].indices(self.shape[0])
        for first, rows in self._pieces(start, stop, self.dtype.itemsize):
            piece = rows[:, *index[1:]]
            target = out[first - start : first - start + len(rows)]
            with np.errstate(over="ignore", invalid="ignore"):  # the error below is clearer
                target[...] = piece
            if not np.isfinite(target).all():
                raise ModelError(self._not_finite(piece, out.dtype))

    def equals(self, other: "Tensor") -> bool:
        """Return whether both hold the same numbers, in any dtypes. Raises ModelError as `dtype` does."""
        if self.shape != other.shape:
            return False
        size = max(self.dtype.itemsize, other.dtype.itemsize)
        count = math.prod(self.shape[:1])
        pairs = zip(self._pieces(0, count, size), other._pieces(0, count, size), strict=True)
        return all(np.array_equal(rows, other_rows) for (_, rows), (_, other_rows) in pairs)

    def is_zero(self) -> bool:
        """Return whether every number is 0. Raises ModelError as `dtype` does."""
        pieces = self._pieces(0, math.prod(self.shape[:1]), self.dtype.itemsize)
        return not any(rows.any() for _, rows in pieces)

    def _pieces(self, start: int, stop: int, itemsize: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, rows): rows `start` to `stop` in pieces of CHUNK bytes, each overwritten by the next.

        The size of a piece counts `itemsize` bytes per number: two tensors with the same one split alike.
        """
        row_size = math.prod(self.shape[1:])
        step = max(1, CHUNK // max(1, row_size * itemsize))
        buffer = np.empty((min(step, stop - start), *self.shape[1:]), self.dtype)
        for first in range(start, stop, step):
            rows = buffer[: min(step, stop - first)]
            self.file.seek(self.begin + first * row_size * self.dtype.itemsize)
            view = rows.reshape(-1).view(np.uint8)
            if self.file.readinto(view) != view.size:  # type: ignore[attr-defined]
                raise ModelError(
                    f"{self.path}: ends within {self.name}, while it was read; download it again"
                )
            yield first, rows

    def _not_finite(self, piece: np.ndarray, dtype: np.dtype) -> str:
        if np.isfinite(piece).all():
            return (
                f"{self.path}: {self.name} holds numbers that {dtype} cannot hold; "
                "load it as float32 or bfloat16"
            )
        return f"{self.path}: {self.name} holds NaN or infinity; use another checkpoint"


def holds_weights(folder: pathlib.Path) -> bool:
    """Return whether the folder has a file for `open_tensors` to open."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[dict[str, Tensor]]:
    """Open every tensor of the folder by name; the files stay open inside the `with`.

    Raises ModelError: no weights, a broken index, a shard that is missing or outside the folder, a
    file that is truncated or whose header does not describe it.
    """
    with contextlib.ExitStack() as stack:
        headers: dict[str, dict[str, Tensor]] = {}

        def header(name: str) -> dict[str, Tensor]:
            if name not in headers:
                headers[name] = _header(folder / name, stack)
            return headers[name]

        if (folder / SINGLE).is_file():
            yield header(SINGLE)
        elif (folder / INDEX).is_file():
            tensors = {}
            for name, shard in _weight_map(folder).items():
                if name not in header(shard):
                    raise ModelError(
                        f"{folder / shard}: does not hold {show(name)}, although {INDEX} lists it "
                        "there; download the folder again"
                    )
                tensors[name] = header(shard)[name]
            yield tensors
        else:
            raise ModelError(
                f"{folder}: neither {SINGLE} nor {INDEX} is there; "
                "opd_jax reads safetensors only (no pickle .bin files): convert the weights"
            )


@contextlib.contextmanager
def open_file(path: pathlib.Path) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Open one file: its tensors by name, and its own notes. Raises ModelError as `open_tensors` does."""
    with contextlib.ExitStack() as stack:
        tensors = _header(path, stack)
        with safe_open(path, framework="numpy") as opened:
            notes = opened.metadata()
        yield tensors, notes or {}


def read_json(path: pathlib.Path) -> Json:
    """Read a JSON object. Raises ModelError: missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; download the folder again") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, wanted an object; correct it")
    return value


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    """Return which shard holds each tensor."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: no weight_map; download the folder again")
    for shard in weight_map.values():
        inside = isinstance(shard, str) and pathlib.PurePath(shard).name == shard
        if not inside or not os.path.isfile(folder / shard):  # False for an impossible name
            raise ModelError(f"{folder / INDEX}: shard {show(shard)} is not in the folder; add it")
    return weight_map


def _header(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """Open a file and read its header; `safe_open` checks that the file matches it."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        file = stack.enter_context(path.open("rb", buffering=0))
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path}: not a readable safetensors file ({reason}); download it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            name, path, file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]),
            entry["dtype"],
        )
        for name, entry in header.items()
    }  # fmt: skip
