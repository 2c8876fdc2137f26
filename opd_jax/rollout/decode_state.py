"""Decode state on the device (one slot per concurrent sequence), and the programs that update it.

Every program donates the state (rows, caches, keys), so caches are updated in place. On a mesh each
replica has its own slots, numbered from 0, and updates them without communication.
"""

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import decoder, kv_cache, low_rank
from opd_jax.models.decoder import Model
from opd_jax.rollout.sampling import Noise, SamplingParams, block_shape, draw_noise, sample
from opd_jax.sharding.mesh import ONE, ROWS, WHOLE, Mesh
from opd_jax.sharding.partition import unwrapped
from opd_jax.types import Array, Outcome

_NOISE_AHEAD = 1 << 20  # most random numbers that are drawn ahead of a chunk of decode steps


class Cycles(flax.struct.PyTreeNode):
    """Length of the current repetition of each row, for each period from 1 to Z.

    Attributes:
      start_B: position of the first response token. Tokens are not compared with those of the prompt.
      run_BZ: at [:, d - 1] the number of consecutive last tokens that equal the token d positions before
        them.
    """

    start_B: jax.Array
    run_BZ: jax.Array


class Slots(flax.struct.PyTreeNode):
    """Decode state, with one row per slot.

    Attributes:
      tokens_BT, logprob_BT: tokens of the rows so far, and log-probs of the sampled ones.
      length_B: number of tokens so far. limit_B: length at which the token budget is used up.
      live_B: the row is still decoding. ended_B: an end token was sampled.
      key_B: one PRNG key per row.
      caches: keys and values of each layer, see models/kv_cache.py.
      cycles: state of stopping on repetition; None if that is off.
    """

    tokens_BT: jax.Array
    logprob_BT: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    live_B: jax.Array
    ended_B: jax.Array
    key_B: jax.Array
    caches: tuple[kv_cache.Cache, ...]
    cycles: Cycles | None = None


class Admitted(flax.struct.PyTreeNode):
    """A right-padded batch of prompts to prefill.

    Attributes:
      tokens_BT, length_B: the prompts.
      limit_B: length at which each row's token budget is used up.
      slot_B: target slot of each row; a row whose slot does not exist is dropped.
      key_B2: data of each row's PRNG key.
    """

    tokens_BT: Array
    length_B: Array
    limit_B: Array
    slot_B: Array
    key_B2: Array


def outcomes(state: Slots, stop_on_repetition: int) -> np.ndarray:
    """Return the outcome of every slot if decoding stopped now (host arrays)."""
    outcome_B = np.where(state.ended_B, Outcome.EOS, Outcome.BUDGET)
    if state.cycles is None:
        return outcome_B
    # Never true for a row that ended: the same end token earlier in the response would have ended it there.
    looped_B = (state.cycles.run_BZ >= stop_on_repetition).any(axis=-1)
    return np.where(looped_B, Outcome.REPETITION, outcome_B)


@partial(jax.jit, static_argnames=("mesh",))
def unstack(model: Model, mesh: Mesh = ONE) -> Model:
    """Copy the model's stacked weights to a tuple of layers, once per rollout instead of once per token.

    Adapters are merged in the copy, so that a token costs what it costs with the base alone.
    """
    layers = low_rank.merge(decoder.unstack(unwrapped(model.params)), model.config.lora_scale)
    return model.replace(params=mesh.constrain(layers, mesh.weights(layers)))


@partial(jax.jit, static_argnames=("slots", "total", "periods", "mesh"))
def empty(model: Model, slots: int, total: int, periods: int, mesh: Mesh = ONE) -> Slots:
    """Return free slots for rows of `total` tokens, for an unstacked model.

    `slots` is the number of slots per replica, and `periods` the size Z of `Cycles` (0: no cycles).
    """
    dtype, slots = model.params["embed"]["embedding"].dtype, slots * mesh.replicas
    state = Slots(
        tokens_BT=jnp.zeros((slots, total), jnp.int32),
        logprob_BT=jnp.zeros((slots, total), jnp.float32),
        length_B=jnp.ones(slots, jnp.int32),
        limit_B=jnp.ones(slots, jnp.int32),
        live_B=jnp.zeros(slots, bool),
        ended_B=jnp.zeros(slots, bool),
        key_B=jax.random.split(jax.random.key(0), slots),
        caches=kv_cache.init(model.config, slots, total, dtype),
        cycles=Cycles(jnp.zeros(slots, jnp.int32), jnp.zeros((slots, periods), jnp.int32))
        if periods
        else None,
    )
    return _shard_slots(state, mesh)


def _shard_slots(state: Slots, mesh: Mesh) -> Slots:
    """Constrain the state to the layout of `slot_places`."""
    return mesh.constrain(state, slot_places(state, mesh))


def slot_places(state: Slots, mesh: Mesh) -> Slots:
    """Return the sharding of every array of the state (arrays or shapes), or Nones on one device.

    Slots are split over replicas, and key heads of the caches as the model's key heads are.
    """
    own = jax.tree.map(lambda _: mesh.slots(), state.replace(caches=()))
    return own.replace(
        caches=jax.tree.map(lambda x: mesh.slots(kv_cache.head_axis(x.dtype)), state.caches)
    )


@partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def prefill(model: Model, state: Slots, prompts: Admitted, mesh: Mesh = ONE) -> Slots:
    """Run the model on the prompts, and write rows, keys and caches to their slots.

    The first decode step feeds the last prompt token again and samples the first response token, so
    that only decode steps sample.
    """
    each = mesh.per_replica(_prefill, (WHOLE, ROWS, ROWS), ROWS)
    return _shard_slots(each(model, state, prompts), mesh)


def _prefill(model: Model, state: Slots, prompts: Admitted) -> Slots:
    """`prefill` on one replica."""
    tokens_BT, length_B, slot_B = prompts.tokens_BT, prompts.length_B, prompts.slot_B
    key_B = jax.random.wrap_key_data(prompts.key_B2)
    width, total = tokens_BT.shape[1], state.tokens_BT.shape[1]
    new = decoder.prefill(model.params, model.config, tokens_BT, length_B)
    caches = tuple(
        kv_cache.place(before, *pair, slot_B)
        for before, pair in zip(state.caches, new, strict=True)
    )
    rows_BT = jnp.pad(tokens_BT, ((0, 0), (0, total - width)))
    cycles = state.cycles
    if cycles is not None:
        cycles = Cycles(
            start_B=cycles.start_B.at[slot_B].set(length_B, mode="drop"),
            run_BZ=cycles.run_BZ.at[slot_B].set(0, mode="drop"),
        )
    return Slots(
        tokens_BT=state.tokens_BT.at[slot_B].set(rows_BT, mode="drop"),
        logprob_BT=state.logprob_BT.at[slot_B].set(0.0, mode="drop"),
        length_B=state.length_B.at[slot_B].set(length_B, mode="drop"),
        limit_B=state.limit_B.at[slot_B].set(prompts.limit_B, mode="drop"),
        live_B=state.live_B.at[slot_B].set(True, mode="drop"),
        ended_B=state.ended_B.at[slot_B].set(False, mode="drop"),
        key_B=state.key_B.at[slot_B].set(key_B, mode="drop"),
        caches=caches,
        cycles=cycles,
    )


@partial(jax.jit, static_argnames=("steps", "mesh"), donate_argnames=("state",))
def decode_chunk(
    model: Model,
    state: Slots,
    few_live: jax.Array,
    sampling: SamplingParams,
    *,
    steps: int,
    mesh: Mesh = ONE,
) -> Slots:
    """Decode up to `steps` tokens in every live slot; stop early when at most `few_live` slots are live.

    On a mesh each replica counts its own live slots, and stops independently of the others.
    """
    own = partial(_decode_chunk, steps=steps)
    each = mesh.per_replica(own, (WHOLE, ROWS, WHOLE, WHOLE), ROWS)
    return _shard_slots(each(model, state, few_live, sampling), mesh)


def _decode_chunk(
    model: Model, state: Slots, few_live: jax.Array, sampling: SamplingParams, *, steps: int
) -> Slots:
    """`decode_chunk` on one replica."""
    head_VD = decoder.head(model.params)  # all rows: slicing to sampling.vocabulary would copy it
    noise = _noise(state, len(head_VD[: sampling.vocabulary]), steps)
    rows = jnp.arange(len(state.live_B))
    stops = jnp.array(sampling.stop_ids, jnp.int32)

    def one_token(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        step, state = carry
        position_B = jnp.where(state.live_B, state.length_B - 1, 0)
        hidden_BD, caches = decoder.decode(
            model.params,
            model.config,
            state.tokens_BT[rows, position_B],
            position_B,
            state.caches,
        )
        logits_BV = decoder.logits(head_VD, hidden_BD)[:, : sampling.vocabulary]
        token_B, logprob_B = sample(logits_BV, noise(step, state), sampling)
        # Rows that are not live write out of bounds, which mode="drop" ignores.
        target_B = jnp.where(state.live_B, state.length_B, state.tokens_BT.shape[1])
        length_B = state.length_B + state.live_B
        stopped_B = state.live_B & jnp.any(token_B[:, None] == stops[None], axis=-1)
        live_B = state.live_B & ~stopped_B & (length_B < state.limit_B)
        cycles = state.cycles
        if cycles is not None:
            cycles = _advance_cycles(cycles, state, token_B)
            live_B &= ~jnp.any(cycles.run_BZ >= sampling.stop_on_repetition, axis=-1)
        state = state.replace(
            tokens_BT=state.tokens_BT.at[rows, target_B].set(token_B, mode="drop"),
            logprob_BT=state.logprob_BT.at[rows, target_B].set(logprob_B, mode="drop"),
            length_B=length_B,
            live_B=live_B,
            ended_B=state.ended_B | stopped_B,
            caches=caches,
            cycles=cycles,
        )
        return step + 1, state

    def unfinished(carry: tuple[jax.Array, Slots]) -> jax.Array:
        return (carry[0] < steps) & (jnp.sum(carry[1].live_B) > few_live)

    return jax.lax.while_loop(unfinished, one_token, (jnp.zeros((), jnp.int32), state))[1]


def _noise(state: Slots, vocabulary: int, steps: int) -> Callable[[jax.Array, Slots], Noise]:
    """Return the noise of every live row by decode step and state.

    The key of a token is that of its row, folded with its position. A live row advances by one position
    per step, so the noise of all steps of a chunk is drawn at once where it is small: on a CPU a random
    number in a loop costs more than a layer of a small model.
    """

    def draw(position_B: jax.Array) -> Noise:
        return draw_noise(jax.vmap(jax.random.fold_in)(state.key_B, position_B), vocabulary)

    if steps * len(state.key_B) * sum(block_shape(vocabulary)) > _NOISE_AHEAD:
        return lambda _, state: draw(state.length_B)
    ahead = jax.vmap(draw)(state.length_B[None] + jnp.arange(steps)[:, None])
    return lambda step, _: jax.tree.map(lambda x: x[step], ahead)


def _advance_cycles(cycles: Cycles, state: Slots, token_B: jax.Array) -> Cycles:
    """Update the runs with `token_B`, the tokens to be written to the live rows of `state`.

    run_d grows by one if token[t] = token[t - d] and both belong to the response, and is reset to 0 if not.
    """
    back_BZ = state.length_B[:, None] - jnp.arange(1, cycles.run_BZ.shape[1] + 1)[None]
    before_BZ = jnp.take_along_axis(state.tokens_BT, jnp.maximum(back_BZ, 0), axis=1)
    same_BZ = (token_B[:, None] == before_BZ) & (back_BZ >= cycles.start_B[:, None])
    run_BZ = jnp.where(same_BZ, cycles.run_BZ + 1, 0)
    return cycles.replace(run_BZ=jnp.where(state.live_B[:, None], run_BZ, cycles.run_BZ))
