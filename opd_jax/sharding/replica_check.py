"""Copies of the same weights on several devices: they are to be equal, byte for byte."""

import collections
import zlib
from typing import Any

import jax
import numpy as np

from opd_jax.errors import CopiesError
from opd_jax.sharding import multihost

Holders = dict[str, dict[str, list[int]]]  # array and part of it: CRC-32: ids of devices


def require_equal(tree: Any, *, when: str) -> None:
    """Compare all parts of a tree of global arrays that more than one device holds.

    Reads those parts to the host, one at a time. Where the run is several processes all of them call
    this, and all raise alike.

    Raises CopiesError: which array, on which devices.
    """
    holders: Holders = collections.defaultdict(lambda: collections.defaultdict(list))
    for theirs in multihost.gathered(_holders(tree)):
        for part, digests in theirs.items():
            for digest, devices in digests.items():
                holders[part][digest] += devices
    wrong = {part: digests for part, digests in holders.items() if len(digests) > 1}
    if not wrong:
        return
    part, digests = next(iter(wrong.items()))
    groups = sorted((sorted(devices) for devices in digests.values()), key=len, reverse=True)
    who = " against ".join(", ".join(map(str, devices)) for devices in groups)
    raise CopiesError(
        f"{when}: devices disagree in {len(wrong)} part{'s' * (len(wrong) > 1)} of the weights, first "
        f"in {part}: {who}; nothing was saved of this step: run the same command again to go on from the "
        "last checkpoint, without the device if it is the same one again"
    )


def _holders(tree: Any) -> Holders:
    """Digests of what the devices of this process hold, of parts that several hold."""
    found: Holders = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, jax.Array):
            continue
        places = leaf.sharding.devices_indices_map(leaf.shape)
        held = collections.Counter(map(str, places.values()))
        for shard in leaf.addressable_shards:
            index = str(shard.index)
            if held[index] > 1:
                part = f"{jax.tree_util.keystr(path)}{_shown(shard.index, leaf.shape)}"
                digest = f"{zlib.crc32(np.asarray(shard.data).tobytes()):08x}"
                found.setdefault(part, {}).setdefault(digest, []).append(shard.device.id)
    return found


def _shown(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """The part of an array that an index is, empty for all of it."""
    if all(part.indices(size) == (0, size, 1) for part, size in zip(index, shape, strict=True)):
        return ""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return f"[{', '.join(f'{start}:{stop}' for start, stop, _ in bounds)}]"
