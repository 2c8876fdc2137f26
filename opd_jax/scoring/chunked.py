"""Log-probs of rows in chunks of tokens, so that no array [batch, time, vocabulary] ever exists."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.models.end_tokens import EVERY_ID, Events

TokenFn = Callable[..., Any]


def map_tokens(
    fn: TokenFn,
    heads: tuple[jax.Array, ...],
    hiddens: tuple[jax.Array, ...],
    tokens_BT: jax.Array,
    per_token: Mapping[str, jax.Array] | None = None,
    *,
    token_chunk: int,
    vocabulary: int | None = None,
    events: Events = EVERY_ID,
    names: Sequence[str] = ("student", "teacher"),
) -> Any:
    """Apply `fn` to the next-token log-probs of each model, a chunk of tokens at a time.

    Args:
      fn: called with one float32 log-softmax [C, V] per model, `token_C` (the ids to score) and
        each array of `per_token` as [C, ...]; returns a tree of [C, ...].
      heads, hiddens: per model the output matrix [>= V, D] and final hidden states [B, T, D]. A head
        is cast to the dtype of its hidden states chunk by chunk, so that the gradient of a float32
        head is summed in float32.
      tokens_BT: the student's ids; ids of V or more are clamped (callers mask them).
      per_token: more [B, T, ...] arrays, aligned with `tokens_BT`.
      token_chunk: the largest number of tokens whose logits exist at one time.
      vocabulary: V; log-probs are normalised over the first V ids, which all models have (None: all
        ids of the heads; no slice of a head is copied).
      events: which ids are scored, and which of them end a response and count as one event.
      names: the role of each head: student, teacher or reference.

    Returns: a tree of [B, T, ...], aligned with `tokens_BT`; position 0, which nothing predicts, is 0.
    """
    batch, time = tokens_BT.shape
    chunks = -(-batch * time // token_chunk)
    token_chunk = -(-batch * time // chunks)  # equal chunks need little padding in the last one
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
        for name, head_VD, hidden_CD in zip(names, heads, hidden_CDs, strict=False):
            logit_CV = decoder.logits(head_VD.astype(hidden_CD.dtype), hidden_CD)
            logit_CV = events.restrict(logit_CV, vocabulary=vocabulary, model=name)
            logprobs.append(jax.nn.log_softmax(logit_CV, axis=-1))
        return None, fn(*logprobs, token_C=events.of_tokens(token_C), **extras)

    extras = {name: shifted(array) for name, array in (per_token or {}).items()}
    chunked = (tuple(cut(hidden) for hidden in hiddens), shifted(tokens_BT), extras)
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
