"""Supports: at each prefix some ids, the most likely of student or teacher, combined. No sort.

Ids [C, X] with -1 where a place holds none; log-probs over a support have -inf there.
"""

import jax
import jax.numpy as jnp

SUPPORTS = ("full", "student", "teacher", "intersection", "union", "symmetric_difference")
_ROUND = 16  # up to here top_k is a kernel of its own on GPUs; beyond it sorts the whole vocabulary


def top_k(logprob_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest and their ids, both [C, k], largest first, ties by id: `lax.top_k` in rounds of 16.

    Each round takes 16 and strikes them out for the next, so that k <= 64 costs at most four passes
    over the vocabulary.
    """
    found = []
    rows_C1 = jnp.arange(logprob_CV.shape[0])[:, None]
    while k > 0:
        values, ids = jax.lax.top_k(logprob_CV, min(k, _ROUND))
        found.append((values, ids))
        k -= _ROUND
        if k > 0:
            logprob_CV = logprob_CV.at[rows_C1, ids].set(-jnp.inf)
    values, ids = (jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    return values, ids


def shared(ids_CX: jax.Array, others_CX: jax.Array) -> jax.Array:
    """Which ids of the first are also among the second. bool [C, X]."""
    return jnp.any(ids_CX[:, :, None] == others_CX[:, None, :], axis=-1)


def combine(student_CX: jax.Array, teacher_CX: jax.Array, support: str) -> jax.Array:
    """Ids of the named support from both models' top-k ids: [C, k], or [C, 2 k] for the last two.

    2604.13016: only_stu, only_tch, intersection, union, union-intersection.
    """
    also_teacher = shared(student_CX, teacher_CX)
    also_student = shared(teacher_CX, student_CX)
    if support == "student":
        return student_CX
    if support == "teacher":
        return teacher_CX
    if support == "intersection":
        return jnp.where(also_teacher, student_CX, -1)
    own = (
        jnp.where(also_teacher, -1, student_CX) if support == "symmetric_difference" else student_CX
    )
    return jnp.concatenate([own, jnp.where(also_student, -1, teacher_CX)], axis=-1)


def gather(logprob_CV: jax.Array, ids_CX: jax.Array) -> jax.Array:
    """Log-probs of a support's ids, -inf where there is none. [C, X]."""
    taken = jnp.take_along_axis(logprob_CV, jnp.maximum(ids_CX, 0), axis=-1)
    return jnp.where(ids_CX >= 0, taken, -jnp.inf)


def rest(logprob_CV: jax.Array, ids_CX: jax.Array) -> jax.Array:
    """log of the mass of all ids outside the support, -inf where none is. [C].

    Summed over what is outside, not 1 - what is inside: that would keep no digit of a small rest.
    """
    vocabulary = logprob_CV.shape[-1]
    rows_C1 = jnp.arange(logprob_CV.shape[0])[:, None]
    target_CX = jnp.where(ids_CX >= 0, ids_CX, vocabulary)  # dropped
    outside_CV = logprob_CV.at[rows_C1, target_CX].set(-jnp.inf, mode="drop")
    some_C = jnp.any(outside_CV > -jnp.inf, axis=-1)
    safe_CV = jnp.where(some_C[:, None], outside_CV, 0.0)
    return jnp.where(some_C, jax.nn.logsumexp(safe_CV, axis=-1), -jnp.inf)
