"""Consistency of replicated weights: their copies on several devices must be equal, byte for byte."""

import collections
import zlib
from typing import Any

import jax
import numpy as np

from opd_jax.errors import CopiesError
from opd_jax.sharding import multihost

Holders = dict[str, dict[str, list[int]]]  # part of an array -> CRC-32 -> ids of its devices


def require_equal(tree: Any, *, when: str) -> None:
    """Compare every part of a tree of global arrays that more than one device holds.

    It copies those parts to the host, one at a time. In a run of several processes all of them must call it,
    and all raise the same error.

    Raises CopiesError: names the array and the devices that disagree.
    """
    holders: Holders = collections.defaultdict(lambda: collections.defaultdict(list))
    for held_by_process in multihost.all_gather(_holders(tree)):
        for part, digests in held_by_process.items():
            for digest, devices in digests.items():
                holders[part][digest] += devices
    unequal = {part: digests for part, digests in holders.items() if len(digests) > 1}
    if not unequal:
        return
    part, digests = next(iter(unequal.items()))
    groups = sorted((sorted(devices) for devices in digests.values()), key=len, reverse=True)
    sides = " against ".join(", ".join(map(str, devices)) for devices in groups)
    raise CopiesError(
        f"{when}: devices disagree in {len(unequal)} part{'s' * (len(unequal) > 1)} of the weights, "
        f"first in {part}: {sides}; this step was not saved: run the same command again to continue from "
        "the last checkpoint, and without that device if it is the same one again"
    )


def _holders(tree: Any) -> Holders:
    """Return the digests of the parts that this process holds and that several devices have copies of."""
    holders: Holders = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, jax.Array):
            continue
        indices = leaf.sharding.devices_indices_map(leaf.shape)
        copies = collections.Counter(map(str, indices.values()))
        for shard in leaf.addressable_shards:
            index = str(shard.index)
            if copies[index] > 1:
                part = f"{jax.tree_util.keystr(path)}{_shown(shard.index, leaf.shape)}"
                digest = f"{zlib.crc32(np.asarray(shard.data).tobytes()):08x}"
                holders.setdefault(part, {}).setdefault(digest, []).append(shard.device.id)
    return holders


def _shown(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Format an index as a part of an array; empty for the complete array."""
    if all(part.indices(size) == (0, size, 1) for part, size in zip(index, shape, strict=True)):
        return ""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return f"[{', '.join(f'{start}:{stop}' for start, stop, _ in bounds)}]"
