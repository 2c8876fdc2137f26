"""The events over which next-token log-probs are normalised: the same for sampler, scorer and losses.

An event is an id that every model of a run can score, or "the response ends here". Models of one
family may end a response by different tokens, and by several: a Qwen2.5-Math folder names
`<|endoftext|>`, its chat template closes a turn with `<|im_end|>`, and an R1-Distill teacher has
one end token, `<｜end▁of▁sentence｜>`. Compared token by token, the end of a response would be
masked or punished; so each model's end tokens count as one event, whose probability is their sum.
"""

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.types import Array, Ends


class Events(flax.struct.PyTreeNode):
    """What log-probs are normalised over.

    Attributes:
      scored_V: bool, the ids that all models score; None for all of them. Of the student's end tokens
        only `ends.id` is among them.
      ends: the end tokens that count as one event; None where each id is an event of its own.
      temperature: logits are divided by it first.
    """

    scored_V: Array = None
    ends: Ends | None = flax.struct.field(pytree_node=False, default=None)
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)

    def restrict(
        self, logits: jax.Array, *, vocabulary: int | None = None, model: str = "student"
    ) -> jax.Array:
        """Logits of the events from all of a model's logits: [..., >= V] -> [..., V], float32.

        Column `ends.id` becomes log sum exp over the columns of the model's own end tokens; ids that
        are not scored get `decoder.EXCLUDED`. `model` is student, teacher or reference; V =
        `vocabulary`, or all columns.
        """
        if self.temperature != 1.0:
            logits = logits / self.temperature
        own = getattr(self.ends, model) if self.ends else ()
        end = None
        if self.ends and own != (self.ends.id,):  # columns beyond V may be end tokens too
            end = jax.nn.logsumexp(jnp.stack([logits[..., i] for i in own], axis=-1), axis=-1)
        logits = logits[..., :vocabulary]
        if end is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            logits = jnp.where(column == self.ends.id, end[..., None], logits)
        return logits if self.scored_V is None else decoder.exclude(logits, self.scored_V)

    def of_tokens(self, token: jax.Array) -> jax.Array:
        """The event of each of the student's tokens: `ends.id` for every end token, else the token itself."""
        if self.ends is None or self.ends.student == (self.ends.id,):
            return token
        for i in self.ends.student:
            token = jnp.where(token == i, self.ends.id, token)
        return token


EVERY_ID = Events()  # each id by itself, untempered
