"""Identify the weights of a model folder by a digest of its tensors."""

import hashlib
import pathlib

import numpy as np

from opd_jax.models.safetensors_files import CHUNK, open_tensors


def fingerprint(path: str) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of a folder's tensors, in order of name.

    How the tensors are divided into files does not matter. Raises ModelError as `open_tensors` does.
    """
    digest = hashlib.sha256()
    with open_tensors(pathlib.Path(path)) as tensors:
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"{name} {tensor.stored} {tensor.shape}\n".encode())
            remaining = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
            tensor.file.seek(tensor.begin)
            while remaining:
                piece = tensor.file.read(min(CHUNK, remaining))
                if not piece:
                    break
                digest.update(piece)
                remaining -= len(piece)
    return digest.hexdigest()
