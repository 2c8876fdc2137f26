"""On-policy rollouts: generate responses with the student, and read them as text."""

from opd_jax.rollout.generate import Batching, generate, programs, row_keys, sample_responses
from opd_jax.rollout.responses import Responses, read_responses
from opd_jax.rollout.sampling import SamplingParams

__all__ = [
    "Batching",
    "Responses",
    "SamplingParams",
    "generate",
    "programs",
    "read_responses",
    "row_keys",
    "sample_responses",
]
