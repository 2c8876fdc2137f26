"""Slots: the decode state on the device, and the programs that fill and advance it.

Every program donates the state (rows, caches, keys), so caches are updated in place. On a mesh each
replica has its own slots, numbered from 0, and fills and advances them without communication.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import decoder, kv_cache
from opd_jax.models.decoder import Model
from opd_jax.rollout.sampling import SamplingParams, sample
from opd_jax.sharding.mesh import ONE, ROWS, WHOLE, Mesh
from opd_jax.sharding.partition import unwrapped
from opd_jax.types import Array, Outcome


class Cycles(flax.struct.PyTreeNode):
    """How long each row has repeated itself, for each period 1 to Z.

    Attributes:
      start_B: where the response begins; prompts are never compared with.
      run_BZ: for period d at [:, d - 1], how many of the last tokens in a row equal the one d before.
    """

    start_B: jax.Array
    run_BZ: jax.Array


class Slots(flax.struct.PyTreeNode):
    """Decode state, one row a slot.

    Attributes:
      tokens_BT, logprob_BT: the rows so far and the log-probs of their sampled tokens.
      length_B: tokens so far. limit_B: length at which the budget is spent.
      live_B: still decoding. ended_B: an end token was emitted.
      key_B: a PRNG key a row.
      caches: a layer's keys and values each, see models/kv_cache.py.
      cycles: what stopping on repetition needs; None where it is off.
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
    """Prompts on their way into slots, right-padded.

    Attributes:
      tokens_BT, length_B: the prompts.
      limit_B: length at which each row's budget is spent.
      slot_B: where each row goes; a slot that does not exist drops it.
      key_B2: the data of each row's PRNG key.
    """

    tokens_BT: Array
    length_B: Array
    limit_B: Array
    slot_B: Array
    key_B2: Array


def outcomes(state: Slots, stop_on_repetition: int) -> np.ndarray:
    """Outcome of every slot if decoding stopped now (host arrays)."""
    outcome_B = np.where(state.ended_B, Outcome.EOS, Outcome.BUDGET)
    if state.cycles is None:
        return outcome_B
    # Never true for a row that ended: an equal token before would have ended it already.
    looped_B = (state.cycles.run_BZ >= stop_on_repetition).any(axis=-1)
    return np.where(looped_B, Outcome.REPETITION, outcome_B)


@partial(jax.jit, static_argnames=("mesh",))
def unstack(model: Model, mesh: Mesh = ONE) -> Model:
    """The model with a copy of its weights as a tuple of layers, made once a rollout, not once a token."""
    layers = decoder.unstack(unwrapped(model.params))
    return model.replace(params=mesh.constrain(layers, mesh.weights(layers)))


@partial(jax.jit, static_argnames=("slots", "total", "periods", "mesh"))
def empty(model: Model, slots: int, total: int, periods: int, mesh: Mesh = ONE) -> Slots:
    """Slots without a row, of `total` tokens each, for an unstacked model.

    `slots` counts those of one replica; `periods` is the size of `Cycles`, 0 for none.
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
    return _where_slots_lie(state, mesh)


def _where_slots_lie(state: Slots, mesh: Mesh) -> Slots:
    """Slots of a replica on its devices; key heads divided as the model's are."""
    return mesh.constrain(state, slot_places(state, mesh))


def slot_places(state: Slots, mesh: Mesh) -> Slots:
    """The sharding of every array of the state, given as arrays or shapes; Nones on one device."""
    own = jax.tree.map(lambda _: mesh.slots(), state.replace(caches=()))
    return own.replace(
        caches=jax.tree.map(lambda x: mesh.slots(kv_cache.head_axis(x.dtype)), state.caches)
    )


@partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def prefill(model: Model, state: Slots, prompts: Admitted, mesh: Mesh = ONE) -> Slots:
    """Run the prompts and place rows, keys and caches into their slots.

    The last prompt token is fed again by the first decode step, which samples the first response
    token: sampling then has one place.
    """
    each = mesh.per_replica(_prefill, (WHOLE, ROWS, ROWS), ROWS)
    return _where_slots_lie(each(model, state, prompts), mesh)


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
    """Up to `steps` tokens for every live slot; stops early when no more than `few_live` are live.

    On a mesh every replica stops when it has no more, whatever the others do.
    """
    own = partial(_decode_chunk, steps=steps)
    each = mesh.per_replica(own, (WHOLE, ROWS, WHOLE, WHOLE), ROWS)
    return _where_slots_lie(each(model, state, few_live, sampling), mesh)


def _decode_chunk(
    model: Model, state: Slots, few_live: jax.Array, sampling: SamplingParams, *, steps: int
) -> Slots:
    """`decode_chunk` on one replica."""
    head_VD = decoder.head(model.params)  # whole: a slice of it would be a copy
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
        # The key of a token is folded from its position in the row.
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.length_B)
        logits_BV = decoder.logits(head_VD, hidden_BD)[:, : sampling.vocabulary]
        token_B, logprob_B = sample(logits_BV, key_B, sampling)
        target_B = jnp.where(state.live_B, state.length_B, state.tokens_BT.shape[1])  # else dropped
        length_B = state.length_B + state.live_B
        stopped_B = state.live_B & jnp.any(token_B[:, None] == stops[None], axis=-1)
        live_B = state.live_B & ~stopped_B & (length_B < state.limit_B)
        cycles = state.cycles
        if cycles is not None:
            cycles = _extended(cycles, state, token_B)
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


def _extended(cycles: Cycles, state: Slots, token_B: jax.Array) -> Cycles:
    """The runs after `token_B`, which is about to be written into the live rows of `state`.

    run_d grows by one where token[t] = token[t - d], both of the response, and else is 0.
    """
    back_BZ = state.length_B[:, None] - jnp.arange(1, cycles.run_BZ.shape[1] + 1)[None]
    before_BZ = jnp.take_along_axis(state.tokens_BT, jnp.maximum(back_BZ, 0), axis=1)
    same_BZ = (token_B[:, None] == before_BZ) & (back_BZ >= cycles.start_B[:, None])
    run_BZ = jnp.where(same_BZ, cycles.run_BZ + 1, 0)
    return cycles.replace(run_BZ=jnp.where(state.live_B[:, None], run_BZ, cycles.run_BZ))
