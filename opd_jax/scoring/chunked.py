"""Log-probs of rows in chunks of tokens, so that no array [batch, time, vocabulary] ever exists."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.types import Array

TokenFn = Callable[..., Any]


def chunk_shape(tokens: int, token_chunk: int) -> tuple[int, int]:
    """Return how many chunks `map_tokens` cuts so many tokens into, and the tokens of each.

    The shares are even, so that hardly any of the last chunk is padding.
    """
    chunks = -(-tokens // token_chunk)
    return chunks, -(-tokens // chunks)


class Readout(flax.struct.PyTreeNode):
    """What a model's next-token log-probs are computed from.

    Attributes:
      head_VD: the output matrix [>= V, D]. It is cast to the dtype of the hidden states chunk by chunk,
        so that the gradient of a float32 one is summed in float32.
      hidden_BTD: final hidden states.
      role: student, teacher or reference: whose end tokens count as the end.
    """

    head_VD: Array
    hidden_BTD: Array
    role: str = flax.struct.field(pytree_node=False, default="student")


def map_tokens(
    fn: TokenFn,
    readouts: Sequence[Readout],
    tokens_BT: jax.Array,
    per_token: Mapping[str, jax.Array] | None = None,
    *,
    token_chunk: int,
    vocabulary: int | None = None,
    events: Events = EVERY_ID,
) -> Any:
    """Apply `fn` to the next-token log-probs of each model, a chunk of tokens at a time.

    Args:
      fn: called with one float32 log-softmax [C, V] per model, `token_C` (the ids to score) and
        each array of `per_token` as [C, ...]; returns a tree of [C, ...].
      readouts: one a model.
      tokens_BT: the student's ids; ids of V or more are clamped (callers mask them).
      per_token: more [B, T, ...] arrays, aligned with `tokens_BT`.
      token_chunk: most tokens whose logits exist at one time.
      vocabulary: V, the first ids that all models have, over which alone log-probs are normalised
        (None: all of the heads; no slice of a head is copied).
      events: which of them are scored, and which end a response and count as one.

    Returns: a tree of [B, T, ...], aligned with `tokens_BT`; position 0, which nothing predicts, is 0.
    """
    batch, time = tokens_BT.shape
    chunks, token_chunk = chunk_shape(batch * time, token_chunk)
    padding = chunks * token_chunk - batch * time

    def cut(array: jax.Array) -> jax.Array:
        flat = array.reshape(batch * time, *array.shape[2:])
        flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(chunks, token_chunk, *flat.shape[1:])

    def shifted(array_BT: jax.Array) -> jax.Array:  # the hidden state at t predicts token t + 1
        return cut(jnp.roll(array_BT, -1, axis=1))

    @partial(jax.checkpoint, prevent_cse=False)
    @jax.named_scope("token_loss")
    def one_chunk(_: None, chunk: tuple) -> tuple[None, dict[str, jax.Array]]:
        hidden_CDs, token_C, extras = chunk
        logprobs = []
        for of, hidden_CD in zip(readouts, hidden_CDs, strict=True):
            logit_CV = decoder.logits(of.head_VD.astype(hidden_CD.dtype), hidden_CD)
            logit_CV = events.restrict(logit_CV, vocabulary=vocabulary, model=of.role)
            logprobs.append(jax.nn.log_softmax(logit_CV, axis=-1))
        return None, fn(*logprobs, token_C=events.of_tokens(token_C), **extras)

    extras = {name: shifted(array) for name, array in (per_token or {}).items()}
    chunked = (tuple(cut(of.hidden_BTD) for of in readouts), shifted(tokens_BT), extras)
    _, out = jax.lax.scan(one_chunk, None, chunked)

    def aligned(values: jax.Array) -> jax.Array:
        flat = values.reshape(-1, *values.shape[2:])[: batch * time]
        return jnp.roll(flat.reshape(batch, time, *flat.shape[1:]), 1, axis=1).at[:, 0].set(0)

    return jax.tree.map(aligned, out)


def align(hidden_BTD: jax.Array, offset_B: jax.Array, width: int) -> jax.Array:
    """Shift hidden states of rows with other prompts to rows of `width`: out[t] = hidden[t + offset].

    Entries from outside the row repeat another position and are meaningless; they are outside the response.
    """
    index_BT = jnp.arange(width)[None] + offset_B[:, None]
    index_BT = jnp.clip(index_BT, 0, hidden_BTD.shape[1] - 1)
    return jnp.take_along_axis(hidden_BTD, index_BT[:, :, None], axis=1)


def take(logprob_CV: jax.Array, token_C: jax.Array) -> jax.Array:
    """Return log p of the given ids: [C, V], [C] -> [C]."""
    return jnp.take_along_axis(logprob_CV, token_C[:, None], axis=-1, mode="clip")[:, 0]
