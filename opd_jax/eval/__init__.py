"""Evaluation: generate answers, grade them in separate processes, summarise."""

from opd_jax.eval.grade import Grade, Grader, grade

__all__ = ["Grade", "Grader", "grade"]
