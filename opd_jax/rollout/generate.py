"""Generation: jitted prefill and decode around a small host loop, with slots that are refilled.

The decode state (rows, caches, keys) lives on the device and is donated from call to call, so
caches are updated in place. Between chunks of decode steps the host looks at which rows are done,
takes them out, and prefills waiting prompts into the free slots. A sample depends on its key
alone, never on slots, chunks or neighbours.
"""

from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.errors import DataError
from opd_jax.models import cache, decoder
from opd_jax.models.architecture import ModelConfig
from opd_jax.rollout.sampling import sample
from opd_jax.types import Outcome, Rollout


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
    caches: tuple[cache.Cache, ...]
    cycles: Cycles | None = None


def generate(
    params: decoder.Params,
    model_config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    max_response_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    slots: int | None = None,
    max_prompt_tokens: int | None = None,
    vocabulary: int | None = None,
    drawn_V: np.ndarray | None = None,
    scored_V: np.ndarray | None = None,
    stop_on_repetition: int = 0,
    repetition_period: int = 16,
    chunk: int | None = None,
) -> Rollout:
    """Sample one response a prompt.

    Args:
      params: stacked parameters, in the dtype to compute in.
      prompts: token ids, any lengths from 1 up.
      key: PRNG key of this batch; row i samples with keys derived from (key, i, position).
      max_response_tokens: budget of a response, the end token included; or one for each prompt.
      temperature, top_p: see `sampling.sample`; temperature 0 is greedy.
      stop_ids: end tokens; the one emitted is kept as the response's last token.
      slots: sequences decoded at one time; None for all.
      max_prompt_tokens: fixes the width of the rows (default: the longest prompt), so that batches
        of other prompts meet the same compiled program.
      vocabulary: sample among the first ids only.
      drawn_V, scored_V: bool [vocabulary], see `sampling.sample`.
      stop_on_repetition: a row ends when its last so many response tokens each equal the response
        token d before them, for one period d from 1 to `repetition_period`; 0 for never.
      chunk: decode steps between two looks from the host; None for 1/16 of the budget, 8 to 128.

    Returns: `Rollout` with rows of max_prompt_tokens + the (largest) budget, in the prompts' order.

    Raises DataError: no prompts, an empty or over-long one, more positions than the model has, or a
    repetition that cannot be.
    """
    width = max_prompt_tokens or max(map(len, prompts), default=0)
    budget_P = np.broadcast_to(np.asarray(max_response_tokens, np.int32), len(prompts))
    _check(prompts, width, budget_P, model_config)
    budget = int(budget_P.max())
    if stop_on_repetition < 0 or (stop_on_repetition and repetition_period < 1):
        raise DataError(
            f"stop_on_repetition={stop_on_repetition}, repetition_period={repetition_period}, wanted "
            "0 for never, or a number of tokens and a period of at least 1"
        )
    total = width + budget
    chunk = chunk or min(max(budget // 16, 8), 128)
    slots = min(slots or len(prompts), len(prompts))
    layers = _unstack(params)
    row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prompts)))
    periods = repetition_period if stop_on_repetition else 0
    state = _empty(layers, model_config, slots, total, periods)
    owner = np.full(slots, -1)  # which prompt sits in each slot
    waiting = list(range(len(prompts)))[::-1]
    out = Rollout(
        tokens_BT=np.zeros((len(prompts), total), np.int32),
        length_B=np.zeros(len(prompts), np.int32),
        prompt_length_B=np.array([len(p) for p in prompts], np.int32),
        sampler_logprob_BT=np.zeros((len(prompts), total), np.float32),
        outcome_B=np.zeros(len(prompts), np.int32),
    )
    while waiting or (owner >= 0).any():
        free = np.flatnonzero(owner < 0)[: len(waiting)]
        if len(free):
            owner[free] = taken = np.array([waiting.pop() for _ in free])
            state = _admit(
                layers, model_config, state, prompts, budget_P, taken, free, row_keys, width
            )
        state = _decode_chunk(
            layers, model_config, state,
            steps=chunk, temperature=temperature, top_p=top_p, stop_ids=tuple(stop_ids),
            vocabulary=vocabulary, drawn_V=drawn_V, scored_V=scored_V,
            stop_on_repetition=stop_on_repetition,
        )  # fmt: skip
        done = np.flatnonzero(~np.asarray(state.live_B) & (owner >= 0))
        if len(done):
            rows = owner[done]
            out.tokens_BT[rows] = np.asarray(state.tokens_BT)[done]
            out.length_B[rows] = np.asarray(state.length_B)[done]
            out.sampler_logprob_BT[rows] = np.asarray(state.logprob_BT)[done]
            out.outcome_B[rows] = _outcomes(state, stop_on_repetition)[done]
            owner[done] = -1
    return out


def _check(
    prompts: Sequence[Sequence[int]], width: int, budget_P: np.ndarray, config: ModelConfig
) -> None:
    if not prompts:
        raise DataError("generate: got no prompts, wanted at least one")
    if budget_P.min() < 1:
        raise DataError(f"max_response_tokens={budget_P.min()}, wanted at least 1")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= width:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens, wanted 1 to max_prompt_tokens={width}; "
                "raise --config.rollout.max_prompt_tokens or shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise DataError(
                f"prompt {i} has token ids {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{config.vocab_size - 1}; use the model's own tokenizer"
            )
    if width + budget_P.max() > config.max_position:
        raise DataError(
            f"prompt ({width}) + response ({budget_P.max()}) tokens are more than the model's "
            f"{config.max_position} positions; lower one of them"
        )


def _outcomes(state: Slots, stop_on_repetition: int) -> np.ndarray:
    """The `Outcome` of every slot, were it done."""
    outcome_B = np.where(np.asarray(state.ended_B), Outcome.EOS, Outcome.BUDGET)
    if state.cycles is None:
        return outcome_B
    # Never true of a row that ended: an equal token before would have ended it already.
    looped_B = (np.asarray(state.cycles.run_BZ) >= stop_on_repetition).any(axis=-1)
    return np.where(looped_B, Outcome.REPETITION, outcome_B)


def _admit(
    layers: decoder.Params,
    config: ModelConfig,
    state: Slots,
    prompts: Sequence[Sequence[int]],
    budget_P: np.ndarray,
    taken: np.ndarray,
    free: np.ndarray,
    row_keys: jax.Array,
    width: int,
) -> Slots:
    """Prefill the prompts `taken` into the slots `free`.

    Few shapes occur: rows in powers of two, as wide as the longest prompt in quarters of `width`.
    """
    count = min(1 << (len(free) - 1).bit_length(), len(state.live_B))
    quarter = -(-width // 4)
    longest = max(len(prompts[row]) for row in taken)
    width = min(-(-longest // quarter) * quarter, width)
    # Surplus rows of the batch aim at a slot that does not exist: the scatter drops them.
    slot = np.full(count, len(state.live_B), np.int32)
    tokens, length = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    budget, source = np.ones(count, np.int32), np.zeros(count, np.int32)
    slot[: len(free)], source[: len(free)], budget[: len(free)] = free, taken, budget_P[taken]
    for i, row in enumerate(taken):
        length[i] = len(prompts[row])
        tokens[i, : length[i]] = prompts[row]
    return _prefill(layers, config, state, tokens, length, length + budget, slot, row_keys[source])


@jax.jit
def _unstack(params: decoder.Params) -> decoder.Params:
    """One copy of the weights as a tuple of layers, made once a rollout and not once a token."""
    return decoder.unstack(params)


@partial(jax.jit, static_argnames=("config", "slots", "total", "periods"))
def _empty(
    layers: decoder.Params, config: ModelConfig, slots: int, total: int, periods: int
) -> Slots:
    dtype = layers["embed"]["embedding"].dtype
    return Slots(
        tokens_BT=jnp.zeros((slots, total), jnp.int32),
        logprob_BT=jnp.zeros((slots, total), jnp.float32),
        length_B=jnp.ones(slots, jnp.int32),
        limit_B=jnp.ones(slots, jnp.int32),
        live_B=jnp.zeros(slots, bool),
        ended_B=jnp.zeros(slots, bool),
        key_B=jax.random.split(jax.random.key(0), slots),
        caches=cache.init(config, slots, total, dtype),
        cycles=Cycles(jnp.zeros(slots, jnp.int32), jnp.zeros((slots, periods), jnp.int32))
        if periods
        else None,
    )


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _prefill(
    layers: decoder.Params,
    config: ModelConfig,
    state: Slots,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    slot_B: jax.Array,
    key_B: jax.Array,
) -> Slots:
    """Run the prompts and place rows, keys and caches into their slots.

    The last prompt token is fed again by the first decode step, which samples the first response
    token: sampling then has one place.
    """
    width, total = tokens_BT.shape[1], state.tokens_BT.shape[1]
    new = decoder.prefill(layers, config, tokens_BT, length_B)
    caches = tuple(
        cache.place(before, *pair, slot_B) for before, pair in zip(state.caches, new, strict=True)
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
        "config",
        "steps",
        "temperature",
        "top_p",
        "stop_ids",
        "vocabulary",
        "stop_on_repetition",
    ),
    donate_argnames=("state",),
)
def _decode_chunk(
    layers: decoder.Params,
    config: ModelConfig,
    state: Slots,
    *,
    steps: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
    vocabulary: int | None,
    drawn_V: jax.Array | None,
    scored_V: jax.Array | None,
    stop_on_repetition: int,
) -> Slots:
    """Up to `steps` tokens for every live slot; stops early when none is live."""
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
            drawn_V=drawn_V,
            scored_V=scored_V,
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
        return (carry[0] < steps) & jnp.any(carry[1].live_B)

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
