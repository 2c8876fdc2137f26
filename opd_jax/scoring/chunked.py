"""Log-probs of rows in chunks of tokens, so that no array [batch, time, vocabulary] ever exists."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import decoder
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.types import Array

TokenFn = Callable[..., Any]
PerToken = Mapping[str, jax.Array]
Places = tuple[np.ndarray, np.ndarray]


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
      ids: of the first readout of `sum_tokens`: whether the function also receives `id_logprob`, the log-prob
        of the token itself, for which every id is an event of its own.
      events: what this model's log-probs are normalised over, where that is not what the others' are.
    """

    head_VD: Array
    hidden_BTD: Array
    role: str = flax.struct.field(pytree_node=False, default="student")
    ids: bool = flax.struct.field(pytree_node=False, default=False)
    events: Events | None = None

    def logprob(self, logit_CV: jax.Array, events: Events) -> jax.Array:
        """Return the log-softmax of a chunk's logits over its own events, or else over `events`."""
        return _log_softmax(logit_CV, self.role, events if self.events is None else self.events)


def map_tokens(
    fn: TokenFn,
    readouts: Sequence[Readout],
    tokens_BT: jax.Array,
    per_token: PerToken = MappingProxyType({}),
    *,
    token_chunk: int,
    counts_BT: jax.Array | None = None,
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
      counts_BT: bool, the tokens to apply it to; None for all. Chunks without such tokens cost nothing.
      events: the ids and end tokens over which log-probs are normalised.

    Returns: a tree of [B, T, ...], aligned with `tokens_BT`, 0 where no token counts and at position 0, which
    nothing predicts.
    """
    index_NC, chunks = _packed(tokens_BT, counts_BT, token_chunk)

    @partial(jax.checkpoint, prevent_cse=False)
    @jax.named_scope("token_loss")
    def values_of(index_C: jax.Array) -> Any:
        logprobs = [of.logprob(_logits(of, index_C), events) for of in readouts]
        extras = {name: _at(x_BT, index_C) for name, x_BT in per_token.items()}
        return fn(*logprobs, token_C=events.of_tokens(_at(tokens_BT, index_C)), **extras)

    def blank(index_C: jax.Array) -> Any:
        like = jax.eval_shape(values_of, index_C)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def one_chunk(number: int, index_C: jax.Array) -> tuple[Any, Any]:
        if counts_BT is None:
            return number, values_of(index_C)
        return number + 1, jax.lax.cond(number < chunks, values_of, blank, index_C)

    _, out = jax.lax.scan(one_chunk, 0, index_NC)
    return jax.tree.map(partial(_unpacked, index_NC, tokens_BT), out)


def sum_tokens(
    fn: TokenFn,
    readouts: Sequence[Readout],
    tokens_BT: jax.Array,
    per_token: PerToken,
    weight_BT: jax.Array,
    scale: Mapping[str, Any],
    *,
    token_chunk: int,
    events: Events = EVERY_ID,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (sum_k scale_k S_k, S), S_k = sum_t weight_t fn_k(t): a loss and its parts, float32 scalars.

    `fn` returns a dict of [C], one for each k; the other arguments are those of `map_tokens`. Logits of
    tokens without weight are not computed, and what `fn` returns for them may be anything.

    Only the first result has a gradient, through the first readout. It is computed in the forward pass,
    while the logits of a chunk are there, so that they are computed once. The gradient of the output
    matrix is summed over chunks in float32.
    """
    index_NC, chunks = _packed(tokens_BT, weight_BT > 0, token_chunk)
    student, *others = readouts
    role, ids = student.role, student.ids
    inputs = _Inputs(
        index_NC, chunks, others, tokens_BT, dict(per_token), weight_BT, dict(scale), events
    )

    def loss_of(
        logit_CV: jax.Array, inputs: _Inputs, index_C: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logprobs = [_log_softmax(logit_CV, role, inputs.events)]
        for of in inputs.others:
            logprobs.append(of.logprob(_logits(of, index_C), inputs.events))
        extras = {name: _at(x_BT, index_C) for name, x_BT in inputs.per_token.items()}
        token_C = inputs.events.of_tokens(_at(inputs.tokens_BT, index_C))
        if ids:
            every_id = Events(vocabulary=inputs.events.vocabulary)
            id_CV = _log_softmax(logit_CV, role, every_id)
            extras["id_logprob"] = take(id_CV, _at(inputs.tokens_BT, index_C))
        values = fn(*logprobs, token_C=token_C, **extras)
        weight_C = _at(inputs.weight_BT, index_C)
        sums = {name: _weighted_sum(x_C, weight_C) for name, x_C in values.items()}
        total = sum((inputs.scale[name] * x for name, x in sums.items()), jnp.zeros(()))
        return total, sums

    total, sums = _sum(loss_of, student.head_VD, student.hidden_BTD, inputs)
    return total, jax.lax.stop_gradient(sums)


class _Inputs(flax.struct.PyTreeNode):
    """Constants of `sum_tokens`; see there. `index_NC`, `chunks`: see `_packed`."""

    index_NC: jax.Array
    chunks: jax.Array
    others: Sequence[Readout]
    tokens_BT: jax.Array
    per_token: dict[str, jax.Array]
    weight_BT: jax.Array
    scale: dict[str, Any]
    events: Events


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(loss_of: Callable, head_VD: jax.Array, hidden_BTD: jax.Array, inputs: _Inputs) -> Any:
    """Sum loss_of(logits, inputs, index) -> (loss, parts) over chunks."""
    student = Readout(head_VD, hidden_BTD)

    @jax.named_scope("token_loss")
    def add(i: jax.Array, sums: Any) -> Any:
        index_C = inputs.index_NC[i]
        return jax.tree.map(jnp.add, sums, loss_of(_logits(student, index_C), inputs, index_C))

    return jax.lax.fori_loop(0, inputs.chunks, add, _zero_sums(loss_of, student, inputs))


def _sum_forward(
    loss_of: Callable, head_VD: jax.Array, hidden_BTD: jax.Array, inputs: _Inputs
) -> Any:
    student, dtype = Readout(head_VD, hidden_BTD), hidden_BTD.dtype

    @jax.named_scope("token_loss")
    def add(i: jax.Array, carry: Any) -> Any:
        sums, d_head_VD, d_hidden_ND = carry
        index_C = inputs.index_NC[i]
        logit_CV = _logits(student, index_C)
        loss, vjp, parts = jax.vjp(lambda x: loss_of(x, inputs, index_C), logit_CV, has_aux=True)
        d_logit_CV = vjp(jnp.ones_like(loss))[0].astype(dtype)
        d_head_VD += jnp.einsum(
            "CV,CD->VD", d_logit_CV, _hidden(student, index_C), preferred_element_type=jnp.float32
        )
        d_hidden_CD = jnp.einsum("CV,VD->CD", d_logit_CV, head_VD.astype(dtype))
        d_hidden_ND = _put(d_hidden_ND, index_C - 1, d_hidden_CD)
        return jax.tree.map(jnp.add, sums, (loss, parts)), d_head_VD, d_hidden_ND

    first = (
        _zero_sums(loss_of, student, inputs),
        jnp.zeros(head_VD.shape, jnp.float32),
        jnp.zeros((inputs.tokens_BT.size, hidden_BTD.shape[-1]), dtype),
    )
    sums, d_head_VD, d_hidden_ND = jax.lax.fori_loop(0, inputs.chunks, add, first)
    return sums, (d_head_VD.astype(head_VD.dtype), d_hidden_ND.reshape(hidden_BTD.shape))


def _sum_backward(
    _: Callable, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, None]:
    d_head_VD, d_hidden_BTD = (cotangents[0].astype(x.dtype) * x for x in gradients)
    return d_head_VD, d_hidden_BTD, None


_sum.defvjp(_sum_forward, _sum_backward)


def _zero_sums(loss_of: Callable, student: Readout, inputs: _Inputs) -> Any:
    like = jax.eval_shape(
        lambda index_C: loss_of(_logits(student, index_C), inputs, index_C), inputs.index_NC[0]
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _packed(
    tokens_BT: jax.Array, counts_BT: jax.Array | None, token_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return where the tokens that count stand in the flattened batch, and how many chunks they fill.

    int32 [N, C]: N chunks of C tokens hold the whole batch. Tokens that count come first, in order; the
    places after them are filled with numbers beyond the batch, each once.
    """
    chunks, size = chunk_shape(tokens_BT.size, token_chunk)
    predicted_BT = jnp.arange(tokens_BT.shape[1])[None] > jnp.zeros(tokens_BT.shape, jnp.int32)
    counts_BT = predicted_BT if counts_BT is None else counts_BT & predicted_BT
    counts_N = counts_BT.reshape(-1)
    count = jnp.sum(counts_N, dtype=jnp.int32)
    place = jnp.arange(chunks * size, dtype=jnp.int32)
    found = jnp.nonzero(counts_N, size=chunks * size, fill_value=0)[0].astype(jnp.int32)
    index = jnp.where(place < count, found, tokens_BT.size + place)
    return index.reshape(chunks, size), -(-count // size)


def _unpacked(index_NC: jax.Array, like_BT: jax.Array, values: jax.Array) -> jax.Array:
    """Return values [N, C, ...] at their places in the batch, [B, T, ...], and 0 elsewhere."""
    values = values.reshape(-1, *values.shape[2:])
    flat = jnp.zeros((like_BT.size, *values.shape[1:]), values.dtype)
    return _put(flat, index_NC.reshape(-1), values).reshape(*like_BT.shape, *values.shape[1:])


def _put(flat: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    return flat.at[index].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)


def _at(x_BT: jax.Array, index_C: jax.Array) -> jax.Array:
    """Return x [B, T, ...] at places of the flattened batch; 0 beyond it. [C, ...]."""
    flat = x_BT.reshape(-1, *x_BT.shape[2:])
    return jnp.take(flat, index_C, axis=0, mode="fill", fill_value=0)


def _hidden(of: Readout, index_C: jax.Array) -> jax.Array:
    """Return the hidden states that predict these tokens: those of the position before. [C, D]."""
    return _at(of.hidden_BTD, index_C - 1)


def _logits(of: Readout, index_C: jax.Array) -> jax.Array:
    hidden_CD = _hidden(of, index_C)
    return decoder.logits(of.head_VD.astype(hidden_CD.dtype), hidden_CD)


def _log_softmax(logit_CV: jax.Array, role: str, events: Events) -> jax.Array:
    return jax.nn.log_softmax(events.restrict(logit_CV, model=role), axis=-1)


def _weighted_sum(values_C: jax.Array, weight_C: jax.Array) -> jax.Array:
    """Sum weight * value over tokens with weight; the values of others may be anything, inf included."""
    counts_C = weight_C > 0
    return jnp.sum(jnp.where(counts_C, weight_C * jnp.where(counts_C, values_C, 0.0), 0.0))


def align(hidden_BTD: jax.Array, offset_B: jax.Array, width: int) -> jax.Array:
    """Shift hidden states of rows with other prompts to rows of `width`: out[t] = hidden[t + offset].

    Entries from outside the row repeat another position and are meaningless; they are outside the response.
    """
    index_BT = jnp.arange(width)[None] + offset_B[:, None]
    index_BT = jnp.clip(index_BT, 0, hidden_BTD.shape[1] - 1)
    return jnp.take_along_axis(hidden_BTD, index_BT[:, :, None], axis=1)


def move(
    hidden_BTD: np.ndarray, places: Places, other_places: Places, shape: tuple[int, int]
) -> np.ndarray:
    """Move the states that predict tokens of some rows to where those of tokens of other rows stand.

    `places`, `other_places`: row and position of each token, from and to; host arrays. Returns an array of
    `shape`, 0 elsewhere.
    """
    out = np.zeros((*shape, hidden_BTD.shape[-1]), hidden_BTD.dtype)
    out[other_places[0], other_places[1] - 1] = hidden_BTD[places[0], places[1] - 1]
    return out


def take(logprob_CV: jax.Array, token_C: jax.Array) -> jax.Array:
    """Return log p of the given ids: [C, V], [C] -> [C]."""
    return jnp.take_along_axis(logprob_CV, token_C[:, None], axis=-1, mode="clip")[:, 0]
