"""Slots: the decode state on the device, and the programs that fill and advance it.

Every program donates the state (rows, caches, keys), so caches are updated in place. On a mesh each
replica has slots of its own, numbered from 0, and fills and advances them without a word to the others.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import decoder, kv_cache
from opd_jax.models.config import ModelConfig
from opd_jax.models.end_tokens import Events
from opd_jax.rollout.sampling import sample
from opd_jax.sharding.mesh import ONE, ROWS, WHOLE, Mesh
from opd_jax.sharding.partition import unwrapped
from opd_jax.types import Outcome


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
      caches: a layer's keys and values each, see models/cache.py.
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


def outcomes(state: Slots, stop_on_repetition: int) -> np.ndarray:
    """The `Outcome` of every slot, were it done; of host arrays."""
    outcome_B = np.where(state.ended_B, Outcome.EOS, Outcome.BUDGET)
    if state.cycles is None:
        return outcome_B
    # Never true of a row that ended: an equal token before would have ended it already.
    looped_B = (state.cycles.run_BZ >= stop_on_repetition).any(axis=-1)
    return np.where(looped_B, Outcome.REPETITION, outcome_B)


@partial(jax.jit, static_argnames=("mesh",))
def unstack(params: decoder.Params, mesh: Mesh = ONE) -> decoder.Params:
    """One copy of the weights as a tuple of layers, made once a rollout and not once a token."""
    layers = decoder.unstack(unwrapped(params))
    return mesh.constrain(layers, mesh.weights(layers))


@partial(jax.jit, static_argnames=("config", "slots", "total", "periods", "mesh"))
def empty(
    layers: decoder.Params,
    config: ModelConfig,
    slots: int,
    total: int,
    periods: int,
    mesh: Mesh = ONE,
) -> Slots:
    """Slots without a row, of `total` tokens each; `periods` for `Cycles`, 0 for none.

    `slots` are those of a replica.
    """
    dtype, slots = layers["embed"]["embedding"].dtype, slots * mesh.replicas
    state = Slots(
        tokens_BT=jnp.zeros((slots, total), jnp.int32),
        logprob_BT=jnp.zeros((slots, total), jnp.float32),
        length_B=jnp.ones(slots, jnp.int32),
        limit_B=jnp.ones(slots, jnp.int32),
        live_B=jnp.zeros(slots, bool),
        ended_B=jnp.zeros(slots, bool),
        key_B=jax.random.split(jax.random.key(0), slots),
        caches=kv_cache.init(config, slots, total, dtype),
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


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("state",))
def prefill(
    layers: decoder.Params,
    config: ModelConfig,
    state: Slots,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    slot_B: jax.Array,
    key_B2: jax.Array,
    mesh: Mesh = ONE,
) -> Slots:
    """Run the prompts and place rows, keys and caches into their slots.

    The last prompt token is fed again by the first decode step, which samples the first response
    token: sampling then has one place. `key_B2` holds the data of each row's key.
    """
    own = partial(_prefill, config=config)
    each = mesh.per_replica(own, (WHOLE, *[ROWS] * 6), ROWS)
    state = each(layers, state, tokens_BT, length_B, limit_B, slot_B, key_B2)
    return _where_slots_lie(state, mesh)


def _prefill(
    layers: decoder.Params,
    state: Slots,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    slot_B: jax.Array,
    key_B2: jax.Array,
    *,
    config: ModelConfig,
) -> Slots:
    """`prefill` on one replica."""
    key_B = jax.random.wrap_key_data(key_B2)
    width, total = tokens_BT.shape[1], state.tokens_BT.shape[1]
    new = decoder.prefill(layers, config, tokens_BT, length_B)
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
        limit_B=state.limit_B.at[slot_B].set(limit_B, mode="drop"),
        live_B=state.live_B.at[slot_B].set(True, mode="drop"),
        ended_B=state.ended_B.at[slot_B].set(False, mode="drop"),
        key_B=state.key_B.at[slot_B].set(key_B, mode="drop"),
        caches=caches,
        cycles=cycles,
    )


@partial(
    jax.jit,
    static_argnames=(
        "mesh",
        "config",
        "steps",
        "temperature",
        "top_p",
        "top_k",
        "stop_ids",
        "vocabulary",
        "stop_on_repetition",
    ),
    donate_argnames=("state",),
)
def decode_chunk(
    layers: decoder.Params,
    config: ModelConfig,
    state: Slots,
    few_live: jax.Array,
    *,
    steps: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: tuple[int, ...],
    vocabulary: int | None,
    drawn_V: jax.Array | None,
    events: Events,
    stop_on_repetition: int,
    mesh: Mesh = ONE,
) -> Slots:
    """Up to `steps` tokens for every live slot; stops early when no more than `few_live` are live.

    On a mesh every replica stops when it has no more, whatever the others do.
    """
    own = partial(
        _decode_chunk, config=config, steps=steps, temperature=temperature, top_p=top_p,
        top_k=top_k, stop_ids=stop_ids, vocabulary=vocabulary,
        stop_on_repetition=stop_on_repetition,
    )  # fmt: skip
    each = mesh.per_replica(own, (WHOLE, ROWS, WHOLE, WHOLE, WHOLE), ROWS)
    return _where_slots_lie(each(layers, state, few_live, drawn_V, events), mesh)


def _decode_chunk(
    layers: decoder.Params,
    state: Slots,
    few_live: jax.Array,
    drawn_V: jax.Array | None,
    events: Events,
    *,
    config: ModelConfig,
    steps: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: tuple[int, ...],
    vocabulary: int | None,
    stop_on_repetition: int,
) -> Slots:
    """`decode_chunk` on one replica."""
    head_VD = decoder.head(layers)  # whole: a slice of it would be a copy
    rows = jnp.arange(len(state.live_B))
    stops = jnp.array(stop_ids, jnp.int32)

    def one_token(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        step, state = carry
        position_B = jnp.where(state.live_B, state.length_B - 1, 0)
        hidden_BD, caches = decoder.decode(
            layers, config, state.tokens_BT[rows, position_B], position_B, state.caches
        )
        # The key of a token is folded from its position in the row.
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.length_B)
        token_B, logprob_B = sample(
            decoder.logits(head_VD, hidden_BD)[:, :vocabulary],
            key_B,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            drawn_V=drawn_V,
            events=events,
        )
        target_B = jnp.where(state.live_B, state.length_B, state.tokens_BT.shape[1])  # else dropped
        length_B = state.length_B + state.live_B
        stopped_B = state.live_B & jnp.any(token_B[:, None] == stops[None], axis=-1)
        live_B = state.live_B & ~stopped_B & (length_B < state.limit_B)
        cycles = state.cycles
        if cycles is not None:
            cycles = _extended(cycles, state, token_B)
            live_B &= ~jnp.any(cycles.run_BZ >= stop_on_repetition, axis=-1)
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
