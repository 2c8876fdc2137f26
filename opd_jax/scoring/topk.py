"""Supports: a few ids at each prefix, the most likely ones of student or teacher, or a combination.

Ids [C, X] are -1 in empty places, and log-probs over a support are -inf there.
"""

import jax
import jax.numpy as jnp

SUPPORTS = ("full", "student", "teacher", "intersection", "union", "symmetric_difference")


def top_k(logprob_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k largest values and their ids, both [C, k], largest first, ties by id, as `lax.top_k`.

    It works in two stages. The k largest values are all in the k blocks of ids with the largest maxima (of
    equal ones the first), so one pass over the vocabulary for the maxima is enough, and `lax.top_k` sorts
    two short rows of about sqrt(k V) places.
    """
    count, vocabulary = logprob_CV.shape
    size = 1 << ((vocabulary // k).bit_length() // 2)
    if k * size * 4 > vocabulary:  # two stages would not be faster
        return jax.lax.top_k(logprob_CV, k)
    padded_CV = jnp.pad(logprob_CV, ((0, 0), (0, -vocabulary % size)), constant_values=-jnp.inf)
    _, block_CK = jax.lax.top_k(jnp.max(padded_CV.reshape(count, -1, size), axis=-1), k)
    block_CK = jnp.sort(block_CK, axis=-1)  # so that of equal values the smaller id comes first
    ids_CX = (block_CK[:, :, None] * size + jnp.arange(size)[None, None]).reshape(count, -1)
    # Gathered from the unpadded array: then the padded one is fused into the maxima, never stored.
    among_CX = jnp.take_along_axis(logprob_CV, jnp.minimum(ids_CX, vocabulary - 1), axis=-1)
    among_CX = jnp.where(ids_CX < vocabulary, among_CX, -jnp.inf)
    values_CK, place_CK = jax.lax.top_k(among_CX, k)
    return values_CK, jnp.take_along_axis(ids_CX, place_CK, axis=-1)


def shared(ids_CX: jax.Array, others_CX: jax.Array) -> jax.Array:
    """Return which ids of the first array are also in the second; bool [C, X]."""
    return jnp.any(ids_CX[:, :, None] == others_CX[:, None, :], axis=-1)


def combine(student_CX: jax.Array, teacher_CX: jax.Array, support: str) -> jax.Array:
    """Return the ids of the named support from both models' top-k: [C, k], or [C, 2 k] for the last two.

    Names in 2604.13016: only_stu, only_tch, intersection, union, union-intersection.
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
    """Return the log-probs of a support's ids, -inf in empty places; [C, X]."""
    logprob_CX = jnp.take_along_axis(logprob_CV, jnp.maximum(ids_CX, 0), axis=-1)
    return jnp.where(ids_CX >= 0, logprob_CX, -jnp.inf)


def rest(logprob_CV: jax.Array, ids_CX: jax.Array) -> jax.Array:
    """Return the log of the tail mass, of all ids outside the support; -inf where there are none; [C].

    It sums over the ids outside: 1 minus the sum inside would lose all digits of a small tail.
    """
    vocabulary = logprob_CV.shape[-1]
    rows_C1 = jnp.arange(logprob_CV.shape[0])[:, None]
    target_CX = jnp.where(ids_CX >= 0, ids_CX, vocabulary)  # dropped
    outside_CV = logprob_CV.at[rows_C1, target_CX].set(-jnp.inf, mode="drop")
    some_C = jnp.any(outside_CV > -jnp.inf, axis=-1)
    safe_CV = jnp.where(some_C[:, None], outside_CV, 0.0)
    return jnp.where(some_C, jax.nn.logsumexp(safe_CV, axis=-1), -jnp.inf)
