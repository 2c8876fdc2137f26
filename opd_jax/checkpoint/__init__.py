"""Checkpoints: write, verify, resume, keep the best one, export."""

from opd_jax.checkpoint.checkpoint import Checkpoints, bytes_of, latest_step, restore_params

__all__ = ["Checkpoints", "bytes_of", "latest_step", "restore_params"]
