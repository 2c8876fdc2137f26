"""Checkpoints: written, verified, resumed from, the best one kept, exported."""

from opd_jax.checkpoint.checkpoint import Checkpoints, bytes_of, latest_step, restore_params

__all__ = ["Checkpoints", "bytes_of", "latest_step", "restore_params"]
