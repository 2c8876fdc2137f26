"""The student's own rollouts: sampling and generation."""

from opd_jax.rollout.generate import generate, programs

__all__ = ["generate", "programs"]
