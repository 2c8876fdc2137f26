"""Grade answers: extract the answer from a response and compare it with gold, in separate processes."""

from opd_jax.grading.grader import Grade, Grader, grade

__all__ = ["Grade", "Grader", "grade"]
