"""Whether an answer is right: read from a response and compared with gold, in other processes."""

from opd_jax.grading.grader import Grade, Grader, grade

__all__ = ["Grade", "Grader", "grade"]
