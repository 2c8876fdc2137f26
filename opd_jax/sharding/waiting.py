"""Weights that wait in host memory between their turns."""

from typing import Any

import jax
import numpy as np

from opd_jax.sharding.mesh import Mesh


def to_host(tree: Any) -> Any:
    """Return weights as host arrays; an array that the tree holds twice is copied once."""
    copies: dict[int, np.ndarray] = {}

    def one(weight: jax.Array) -> np.ndarray:
        if id(weight) not in copies:
            copies[id(weight)] = np.array(weight)
        return copies[id(weight)]

    return jax.tree.map(one, tree)


def place(params: Any, mesh: Mesh) -> Any:
    """Return host arrays in the layout of compute weights, as `Mesh.reshard` gave it to them."""
    if mesh.devices is None:
        return jax.tree.map(jax.numpy.asarray, params)  # uncommitted, as weights are loaded
    return jax.tree.map(jax.device_put, params, mesh.weights(params))
