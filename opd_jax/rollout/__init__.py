"""The student's own rollouts: sampling and generation."""

from opd_jax.rollout.generate import generate

__all__ = ["generate"]
