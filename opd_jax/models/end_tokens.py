"""The events over which next-token log-probs are normalised: the same for sampler, scorer and losses.

An event is an id that every model of a run can score, or "the response ends here". Models of one
family may end a response with different tokens, and with several: a Qwen2.5-Math folder names
`<|endoftext|>`, its chat template closes a turn with `<|im_end|>`, and an R1-Distill teacher has
one end token, `<｜end▁of▁sentence｜>`. Compared token by token, the end of a response would be
masked or punished. Therefore each model's end tokens count as one event, whose probability is their sum.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.types import Array, Ends


class Events(flax.struct.PyTreeNode):
    """The set of events over which log-probs are normalised.

    Attributes:
      vocabulary: V, the first ids that all models have, to which logits are cut; None for all columns (no
        slice of an output matrix is copied).
      scored_V: bool, the ids that all models score; None for all of them. Of the student's end tokens
        only `ends.id` is among them.
      ends: the end tokens that count as one event; None where each id is an event of its own.
      temperature: logits are divided by it first.
    """

    vocabulary: int | None = flax.struct.field(pytree_node=False, default=None)
    scored_V: Array = None
    ends: Ends | None = flax.struct.field(pytree_node=False, default=None)
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)

    def restrict(self, logits: jax.Array, *, model: str = "student") -> jax.Array:
        """Reduce a model's logits to those of the events: [..., >= V] -> [..., V], float32.

        Column `ends.id` becomes log sum exp over the columns of the model's own end tokens; ids that
        are not scored get `decoder.EXCLUDED`. `model` is student, teacher or reference.
        """
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.ends and (own := getattr(self.ends, model)) != (self.ends.id,):
            logits = _with_one_end(logits, own, self.ends.id)
        logits = logits[..., : self.vocabulary]  # cut last: columns beyond V may be end tokens
        return logits if self.scored_V is None else decoder.exclude(logits, self.scored_V)

    def of_tokens(self, token: jax.Array) -> jax.Array:
        """Return the event of each of the student's tokens: `ends.id` for end tokens, else the token."""
        if self.ends is None or self.ends.student == (self.ends.id,):
            return token
        for i in self.ends.student:
            token = jnp.where(token == i, self.ends.id, token)
        return token


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _with_one_end(logits: jax.Array, own: tuple[int, ...], end: int) -> jax.Array:
    """Replace column `end` of the logits by log sum exp over the columns `own`.

    The gradient is written by hand: that of slices would add one array of the logits' size for each.
    """
    return _one_end_forward(logits, own, end)[0]


def _one_end_forward(
    logits: jax.Array, own: tuple[int, ...], end: int
) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.stack([logits[..., i] for i in own], axis=-1)
    total = jax.nn.logsumexp(tokens, axis=-1, keepdims=True)
    return jnp.where(_columns(logits) == end, total, logits), jnp.exp(tokens - total)


def _one_end_backward(
    own: tuple[int, ...], end: int, share: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    at_end, column = gradient[..., end, None], _columns(gradient)
    gradient = jnp.where(column == end, 0.0, gradient)
    for k, i in enumerate(own):
        gradient = jnp.where(column == i, share[..., k, None] * at_end, gradient)
    return (gradient,)


_with_one_end.defvjp(_one_end_forward, _one_end_backward)


def _columns(logits: jax.Array) -> jax.Array:
    """Return the id of each entry: int32, of the logits' shape."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


EVERY_ID = Events()  # each id is an event of its own, temperature 1
