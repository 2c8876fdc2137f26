"""Models by hub name: located in the local cache, or downloaded once where there is a network."""

import contextlib
import fcntl
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from opd_jax.errors import ModelError
from opd_jax.models.safetensors_files import INDEX, SINGLE, read_json

# Weights, settings and tokenizer; never code or pickles.
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def _complete(folder: pathlib.Path) -> bool:
    """Return whether a cached folder has settings, tokenizer, and every file of weights."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    if (folder / SINGLE).is_file():
        return True
    shards = read_json(folder / INDEX)["weight_map"].values()
    return all((folder / shard).is_file() for shard in shards)


def locate(path: str) -> str:
    """Return the folder of a model: `path` itself where it exists, else that of the hub model of this name.

    Only a name of the form OWNER/MODEL that the cache does not hold is looked up on the network. Of the
    processes of one machine that need it at the same time, one downloads it and the others wait.

    Raises ModelError: no such folder and no such name, or the hub cannot be reached.
    """
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path[0] in "./":
        return path  # reading a folder that does not exist raises the error
    if cached := _cached(path):
        return cached
    with _one_at_a_time(path) as waited:
        if waited and (cached := _cached(path)):
            return cached
        return _download(path)


def _cached(path: str) -> str | None:
    """Return the folder of a model that the cache holds completely, else None."""
    from huggingface_hub import snapshot_download  # needed only for hub models

    with contextlib.suppress(Exception):  # the model is not in the cache
        cached = snapshot_download(path, allow_patterns=_FILES, local_files_only=True)
        if _complete(pathlib.Path(cached)):
            return cached
    return None


def _download(path: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        print(f"fetching {path} from the Hugging Face hub", flush=True)
        return snapshot_download(path, allow_patterns=_FILES)
    except Exception as error:  # the hub's client may raise any type of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {path!r} is neither a folder nor can it be fetched from the hub ({reason:.200}); "
            "give the path of a Hugging Face folder"
        ) from None


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[bool]:
    """Hold this machine's lock of a model; yield whether another process held it before.

    The lock is a file in the machine's folder for temporary files, because locks on network disks are
    not reliable. The system releases it where its process dies. Without such a file nothing is locked.
    """
    name = re.sub(r"[^\w.-]", "--", path)
    file = pathlib.Path(tempfile.gettempdir()) / f"opd_jax-{os.getuid()}-{name}.lock"
    try:
        handle = os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        waited = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: another process of this machine is fetching it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
            waited = True
        yield waited
    finally:
        os.close(handle)
