"""From logits to a token and its log-prob: temperature, top-k, top-p, a draw; no vocabulary is sorted."""

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.scoring import topk
from opd_jax.types import Array

_BISECTIONS = 30


class SamplingParams(flax.struct.PyTreeNode):
    """How responses are sampled: the distribution of a token, and what ends a response.

    Numbers are static under jit, arrays are not.

    Attributes:
      max_response_tokens: budget of a response, the end token included; a tuple holds one a prompt.
      temperature: logits are divided by it; 0 is greedy.
      top_p, top_k: nucleus and top-k truncation; 1 and 0 are off.
      stop_ids: end tokens; the one emitted is kept as the response's last token.
      vocabulary: sample among the first ids only; None for all.
      drawn_V: bool [vocabulary], ids that may be drawn; None for all.
      events: what the recorded log-probs are normalised over.
      stop_on_repetition: end a response whose last so many tokens all equal the token one period
        before them; 0 is off.
      repetition_period: longest period that counts.
    """

    max_response_tokens: int | tuple[int, ...] = flax.struct.field(pytree_node=False)
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)
    top_p: float = flax.struct.field(pytree_node=False, default=1.0)
    top_k: int = flax.struct.field(pytree_node=False, default=0)
    stop_ids: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    vocabulary: int | None = flax.struct.field(pytree_node=False, default=None)
    drawn_V: Array = None
    events: Events = EVERY_ID
    stop_on_repetition: int = flax.struct.field(pytree_node=False, default=0)
    repetition_period: int = flax.struct.field(pytree_node=False, default=16)

    @property
    def periods(self) -> int:
        """Periods whose repetition is tracked while decoding."""
        return self.repetition_period if self.stop_on_repetition else 0


@jax.named_scope("sample")
def sample(
    logits_BV: jax.Array, key_B: jax.Array, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row -> (token_B int32, logprob_B float32).

    The draw is from softmax(logits / temperature) cut to its `top_k` most likely ids (0: all), and
    what is left of that to its nucleus of mass `top_p`; temperature 0 takes the most likely token.
    The log-prob is that of the token's event under the model itself, whatever the sampling settings,
    so it can be compared with the scorer's: over `events`, where every end token has the log-prob of
    the end. Only ids in `drawn_V` are drawn; one that is drawn and not scored has log-prob 0.
    """
    events = sampling.events
    logits_BV = logits_BV.astype(jnp.float32)
    scored_BV = events.restrict(logits_BV)
    if sampling.drawn_V is not None:
        logits_BV = decoder.exclude(logits_BV, sampling.drawn_V)
    if sampling.temperature == 0.0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        tempered_BV = logits_BV / sampling.temperature
        if 0 < sampling.top_k < tempered_BV.shape[-1]:
            tempered_BV = most_likely(tempered_BV, sampling.top_k)
        if sampling.top_p < 1.0:
            tempered_BV = nucleus(tempered_BV, sampling.top_p)
        token_B = draw(tempered_BV, key_B)
    event_B = events.of_tokens(token_B)
    chosen_B = jnp.take_along_axis(scored_BV, event_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(_block_mass(_blocks(scored_BV)), axis=-1)
    if events.scored_V is not None:
        logprob_B = jnp.where(events.scored_V[event_B], logprob_B, 0.0)
    return token_B.astype(jnp.int32), logprob_B


def draw(logits_BV: jax.Array, key_B: jax.Array) -> jax.Array:
    """One id a row from softmax(logits): which block of ids, then which id of it. [B].

    p(v) = p(block) p(v | block), each drawn as the argmax of logits plus Gumbel noise: about
    2 sqrt(V) random numbers instead of V. Exact; -inf and `EXCLUDED` are never drawn.
    """
    blocks_BMX = _blocks(logits_BV)
    keys_B2 = jax.vmap(jax.random.split)(key_B)
    block_B = _gumbel_argmax(_block_mass(blocks_BMX), keys_B2[:, 0])
    inside_BX = jnp.take_along_axis(blocks_BMX, block_B[:, None, None], axis=1)[:, 0]
    return block_B * blocks_BMX.shape[-1] + _gumbel_argmax(inside_BX, keys_B2[:, 1])


def _gumbel_argmax(logits_BX: jax.Array, key_B: jax.Array) -> jax.Array:
    noise_BX = jax.vmap(lambda key: jax.random.gumbel(key, logits_BX.shape[1:]))(key_B)
    return jnp.argmax(logits_BX + noise_BX, axis=-1)


def _blocks(logits_BV: jax.Array) -> jax.Array:
    """The ids as about sqrt(V) blocks of a power of two each, filled up with -inf. [B, M, X]."""
    vocabulary = logits_BV.shape[-1]
    size = 1 << (vocabulary.bit_length() // 2)
    padding = -vocabulary % size
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits_BV.reshape(logits_BV.shape[0], -1, size)


def _block_mass(blocks_BMX: jax.Array) -> jax.Array:
    """log sum exp of each block; -inf where it holds nothing. [B, M]."""
    return jax.nn.logsumexp(blocks_BMX, axis=-1)


def most_likely(logits_BV: jax.Array, k: int) -> jax.Array:
    """-inf outside the `k` most likely ids and those as likely as the last of them. [B, V]."""
    values_BK, _ = topk.top_k(logits_BV, k)
    return jnp.where(logits_BV >= values_BK[:, -1:], logits_BV, -jnp.inf)


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """-inf outside the smallest set of most likely ids whose mass is at least `top_p`. [B, V].

    Bisects for the largest probability threshold whose mass still reaches top_p: no sort. Ids
    exactly as likely as the last one in stay in. The most likely id always stays.
    """
    prob_BV = jax.nn.softmax(logits_BV, axis=-1)

    def mass(threshold_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(prob_BV >= threshold_B[:, None], prob_BV, 0.0), axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = 0.5 * (low_B + high_B)
        enough_B = mass(middle_B) >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    top_B = jnp.max(prob_BV, axis=-1)
    low_B, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(top_B), top_B))
    threshold_B = jnp.where(mass(top_B) >= top_p, top_B, low_B)
    return jnp.where(prob_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
