"""Sample a token from logits (temperature, top-k, top-p) without sorting; return it with its log-prob."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.scoring import topk
from opd_jax.types import Array

_BISECTIONS = 30  # of the probability threshold in `nucleus`


class SamplingParams(flax.struct.PyTreeNode):
    """Sampling settings: the distribution of a token, and the conditions that end a response.

    Numbers are static under jit, arrays are not.

    Attributes:
      max_response_tokens: token budget of a response, including its end token; a tuple holds one budget
        per prompt.
      temperature: divisor of the logits; 0 is greedy decoding.
      top_p, top_k: nucleus and top-k truncation; 1 and 0 are off.
      stop_ids: end tokens; the sampled one is kept as the response's last token.
      vocabulary: sample among the first `vocabulary` ids only; None for all.
      drawn_V: bool [vocabulary], allowed-token mask; None allows all.
      events: set of events over which the recorded log-probs are normalised.
      stop_on_repetition: end a response when each of its last `stop_on_repetition` tokens equals the
        token one period before it; 0 is off.
      repetition_period: longest period that is checked.
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
        """Number of periods tracked while decoding; 0 if stopping on repetition is off."""
        return self.repetition_period if self.stop_on_repetition else 0


class Noise(NamedTuple):
    """The Gumbel noise of one token per row: for the choice of a block of ids, and inside the block."""

    block_BM: jax.Array
    inside_BX: jax.Array


@jax.named_scope("sample")
def sample(
    logits_BV: jax.Array, noise: Noise, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """Sample one token per row -> (token_B int32, logprob_B float32).

    The token is sampled from softmax(logits / temperature), truncated first to the `top_k` most likely
    ids (0: all) and then to the nucleus of mass `top_p`; temperature 0 takes the most likely token.
    Only ids in `drawn_V` are sampled.

    The log-prob is that of the token's event, normalised over `events`, and does not depend on the
    other sampling settings: it can be compared with the scorer's. End tokens that form one event all
    have the log-prob of that event. A sampled id that is not scored has log-prob 0.
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
        token_B = draw(tempered_BV, noise)
    event_B = events.of_tokens(token_B)
    chosen_B = jnp.take_along_axis(scored_BV, event_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(_block_mass(_blocks(scored_BV)), axis=-1)
    if events.scored_V is not None:
        logprob_B = jnp.where(events.scored_V[event_B], logprob_B, 0.0)
    return token_B.astype(jnp.int32), logprob_B


def draw_noise(key_B: jax.Array, vocabulary: int) -> Noise:
    """Draw the noise of one token per row, from the key of that row and position."""
    blocks, size = block_shape(vocabulary)
    keys_B2 = jax.vmap(jax.random.split)(key_B)
    gumbel = jax.vmap(jax.random.gumbel, in_axes=(0, None))
    return Noise(gumbel(keys_B2[:, 0], (blocks,)), gumbel(keys_B2[:, 1], (size,)))


def draw(logits_BV: jax.Array, noise: Noise) -> jax.Array:
    """Sample one id per row from softmax(logits): first a block of ids, then an id of that block. [B].

    p(v) = p(block) p(v | block). Each factor is sampled as the argmax of logits plus Gumbel noise, which
    takes about 2 sqrt(V) random numbers instead of V. The samples are exact; ids with logit -inf or
    `EXCLUDED` are never sampled.
    """
    blocks_BMX = _blocks(logits_BV)
    block_B = jnp.argmax(_block_mass(blocks_BMX) + noise.block_BM, axis=-1)
    inside_BX = jnp.take_along_axis(blocks_BMX, block_B[:, None, None], axis=1)[:, 0]
    inside_B = jnp.argmax(inside_BX + noise.inside_BX, axis=-1)
    return block_B * blocks_BMX.shape[-1] + inside_B


def _blocks(logits_BV: jax.Array) -> jax.Array:
    """Reshape to blocks of ids, padded with -inf. [B, M, X]."""
    blocks, size = block_shape(logits_BV.shape[-1])
    padding = blocks * size - logits_BV.shape[-1]
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits_BV.reshape(-1, blocks, size)


def block_shape(vocabulary: int) -> tuple[int, int]:
    """Return how many blocks the ids are divided into, about sqrt(V), and the ids of each, a power of 2."""
    size = 1 << (vocabulary.bit_length() // 2)
    return -(-vocabulary // size), size


def _block_mass(blocks_BMX: jax.Array) -> jax.Array:
    """Log-sum-exp of each block; -inf if the block has no possible id. [B, M]."""
    return jax.nn.logsumexp(blocks_BMX, axis=-1)


def most_likely(logits_BV: jax.Array, k: int) -> jax.Array:
    """Set logits to -inf outside the `k` most likely ids; ids that tie with the last one stay. [B, V]."""
    values_BK, _ = topk.top_k(logits_BV, k)
    return jnp.where(logits_BV >= values_BK[:, -1:], logits_BV, -jnp.inf)


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Set logits to -inf outside the smallest set of most likely ids with mass >= `top_p`. [B, V].

    Finds the largest probability threshold whose mass still reaches top_p by bisection, without a sort.
    Ids that tie with the least likely one kept stay, and the most likely id always stays.
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
