"""Supports: at each prefix some ids, the most likely of student or teacher, combined; no long sort.

Ids [C, X] with -1 where a place holds none; log-probs over a support have -inf there.
"""

import jax
import jax.numpy as jnp

SUPPORTS = ("full", "student", "teacher", "intersection", "union", "symmetric_difference")


def top_k(logprob_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest and their ids, both [C, k], largest first, ties by id: `lax.top_k`, in two stages.

    The k largest are all in the k blocks of ids with the largest maxima (of equal ones the first), so
    one pass over the vocabulary for the maxima is enough, and `lax.top_k` sees two short rows of
    about sqrt(k V) places.
    """
    count, vocabulary = logprob_CV.shape
    size = 1 << ((vocabulary // k).bit_length() // 2)
    if k * size * 4 > vocabulary:  # nothing to be won
        return jax.lax.top_k(logprob_CV, k)
    padded_CV = jnp.pad(logprob_CV, ((0, 0), (0, -vocabulary % size)), constant_values=-jnp.inf)
    _, block_CK = jax.lax.top_k(jnp.max(padded_CV.reshape(count, -1, size), axis=-1), k)
    block_CK = jnp.sort(block_CK, axis=-1)  # so that of equal values the smaller id comes first
    ids_CX = (block_CK[:, :, None] * size + jnp.arange(size)[None, None]).reshape(count, -1)
    # Of the array itself: the padded one is then a step of the maxima and nowhere in memory.
    among_CX = jnp.take_along_axis(logprob_CV, jnp.minimum(ids_CX, vocabulary - 1), axis=-1)
    among_CX = jnp.where(ids_CX < vocabulary, among_CX, -jnp.inf)
    values_CK, place_CK = jax.lax.top_k(among_CX, k)
    return values_CK, jnp.take_along_axis(ids_CX, place_CK, axis=-1)


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
