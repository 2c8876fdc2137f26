"""Generation: jitted prefill and decode around a small host loop, with slots that are refilled.

The decode state (rows, caches, keys) lives on the device and is donated from call to call, so
caches are updated in place. Between chunks of decode steps the host looks at which rows are done,
takes them out, and prefills waiting prompts into the free slots. A sample depends on its key
alone, never on slots, chunks or neighbours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.errors import DataError
from opd_jax.models import decoder
from opd_jax.models.architecture import ModelConfig
from opd_jax.programs import Program
from opd_jax.rollout import decoding
from opd_jax.types import Rollout

_PREFILL_TOKENS = 16_384  # prompts that go through the model at one time


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that a generation meets, whatever its prompts: few programs are ever compiled.

    Attributes:
      slots: sequences decoded at one time. total: tokens of a row.
      prompt_widths: of a batch of prompts: quarters of the longest there may be.
      many, few: prompts that are prefilled at one time: at first, and as slots fall free.
      chunk: decode steps between two looks from the host.
    """

    slots: int
    total: int
    prompt_widths: tuple[int, ...]
    many: int
    few: int
    chunk: int

    @classmethod
    def of(
        cls,
        prompts: int,
        *,
        slots: int | None,
        prompt_tokens: int,
        response_tokens: int,
        chunk: int | None,
    ) -> "Shapes":
        """`slots` and `chunk` as in `generate`."""
        slots = min(slots or prompts, prompts)
        quarter = -(-prompt_tokens // 4)
        few = -(-slots // 16)
        return cls(
            slots=slots,
            total=prompt_tokens + response_tokens,
            prompt_widths=tuple(sorted({min(quarter * i, prompt_tokens) for i in (1, 2, 3, 4)})),
            many=max(min(_PREFILL_TOKENS // prompt_tokens, slots), few),
            few=few,
            chunk=chunk or min(max(response_tokens // 16, 8), 128),
        )


def generate(
    params: decoder.Params,
    model_config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array | None = None,
    row_keys: jax.Array | None = None,
    max_response_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    slots: int | None = None,
    max_prompt_tokens: int | None = None,
    vocabulary: int | None = None,
    drawn_V: np.ndarray | None = None,
    scored_V: np.ndarray | None = None,
    stop_on_repetition: int = 0,
    repetition_period: int = 16,
    chunk: int | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample one response a prompt.

    Args:
      params: stacked parameters, in the dtype to compute in.
      prompts: token ids, any lengths from 1 up.
      key: PRNG key of this batch; row i samples with keys derived from (key, i, position).
      row_keys: instead of `key`, [prompts]: row i samples with keys of (row_keys[i], position).
      max_response_tokens: budget of a response, the end token included; or one for each prompt.
      temperature, top_p, top_k: see `sampling.sample`; temperature 0 is greedy.
      stop_ids: end tokens; the one emitted is kept as the response's last token.
      slots: sequences decoded at one time; None for all.
      max_prompt_tokens: fixes the width of the rows (default: the longest prompt), so that batches
        of other prompts meet the same compiled program.
      vocabulary: sample among the first ids only.
      drawn_V, scored_V: bool [vocabulary], see `sampling.sample`.
      stop_on_repetition: a row ends when its last so many response tokens each equal the response
        token d before them, for one period d from 1 to `repetition_period`; 0 for never.
      chunk: decode steps between two looks from the host; None for 1/16 of the budget, 8 to 128.
      on_finished: told how many responses are finished, whenever these are more.

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
    shapes = Shapes.of(
        len(prompts), slots=slots, prompt_tokens=width, response_tokens=budget, chunk=chunk
    )
    settings = _settings(
        shapes, temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=stop_ids,
        vocabulary=vocabulary, drawn_V=drawn_V, scored_V=scored_V,
        stop_on_repetition=stop_on_repetition,
    )  # fmt: skip
    layers = decoding.unstack(params)
    if row_keys is None:
        assert key is not None, "generate: one of key and row_keys is wanted"
        row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prompts)))
    periods = repetition_period if stop_on_repetition else 0
    state = decoding.empty(layers, model_config, shapes.slots, shapes.total, periods)
    owner = np.full(shapes.slots, -1)  # which prompt sits in each slot
    waiting = list(range(len(prompts)))[::-1]
    out = Rollout(
        tokens_BT=np.zeros((len(prompts), shapes.total), np.int32),
        length_B=np.zeros(len(prompts), np.int32),
        prompt_length_B=np.array([len(p) for p in prompts], np.int32),
        sampler_logprob_BT=np.zeros((len(prompts), shapes.total), np.float32),
        outcome_B=np.zeros(len(prompts), np.int32),
    )
    while waiting or (owner >= 0).any():
        free = np.flatnonzero(owner < 0)
        while waiting and len(free) >= min(shapes.few, len(waiting)):
            count = shapes.many if min(len(free), len(waiting)) >= shapes.many else shapes.few
            slot, free = free[: min(count, len(waiting))], free[count:]
            owner[slot] = taken = np.array([waiting.pop() for _ in slot])
            admitted = _admitted(shapes, count, prompts, budget_P, taken, slot, row_keys)
            state = decoding.prefill(layers, model_config, state, *admitted)
        few_live = shapes.slots - min(shapes.few, len(waiting)) if waiting else 0
        state = decoding.decode_chunk(layers, model_config, state, np.int32(few_live), **settings)
        done = np.flatnonzero(~np.asarray(state.live_B) & (owner >= 0))
        if len(done):
            rows = owner[done]
            out.tokens_BT[rows] = np.asarray(state.tokens_BT)[done]
            out.length_B[rows] = np.asarray(state.length_B)[done]
            out.sampler_logprob_BT[rows] = np.asarray(state.logprob_BT)[done]
            out.outcome_B[rows] = decoding.outcomes(state, stop_on_repetition)[done]
            owner[done] = -1
            if on_finished is not None:
                on_finished(int((out.length_B > 0).sum()))
    return out


def programs(
    params: decoder.Params,
    model_config: ModelConfig,
    prompts: int,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    slots: int | None = None,
    stop_on_repetition: int = 0,
    repetition_period: int = 16,
    chunk: int | None = None,
    **sampling: Any,
) -> list[Program]:
    """Everything that `generate` compiles for so many prompts with these settings.

    `params` may be shapes and dtypes alone.
    """
    shapes = Shapes.of(
        prompts, slots=slots, prompt_tokens=max_prompt_tokens,
        response_tokens=max_response_tokens, chunk=chunk,
    )  # fmt: skip
    periods = repetition_period if stop_on_repetition else 0
    state_shape = (model_config, shapes.slots, shapes.total, periods)
    layers = jax.eval_shape(decoding.unstack, params)
    state = jax.eval_shape(lambda layers: decoding.empty(layers, *state_shape), layers)
    out = [
        Program("unstack", decoding.unstack, (params,)),
        Program("empty slots", decoding.empty, (layers, *state_shape)),
    ]
    for count in sorted({shapes.many, shapes.few} if prompts > shapes.slots else {shapes.many}):
        row = jax.ShapeDtypeStruct((count,), jnp.int32)
        key_B = jax.ShapeDtypeStruct((count,), state.key_B.dtype)
        for width in shapes.prompt_widths:
            tokens_BT = jax.ShapeDtypeStruct((count, width), jnp.int32)
            given = (layers, model_config, state, tokens_BT, row, row, row, key_B)
            out.append(Program(f"prefill {count} x {width}", decoding.prefill, given))
    settings = _settings(shapes, stop_on_repetition=stop_on_repetition, **sampling)
    chunk_of = (layers, model_config, state, jax.ShapeDtypeStruct((), jnp.int32))
    name = f"decode {shapes.slots} x {shapes.total}"
    out.append(Program(name, decoding.decode_chunk, chunk_of, settings))
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


def _settings(
    shapes: Shapes,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    vocabulary: int | None = None,
    drawn_V: np.ndarray | None = None,
    scored_V: np.ndarray | None = None,
    stop_on_repetition: int = 0,
) -> dict[str, Any]:
    """The keyword arguments of `decoding.decode_chunk`."""
    return {
        "steps": shapes.chunk, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "stop_ids": tuple(stop_ids), "vocabulary": vocabulary, "drawn_V": drawn_V,
        "scored_V": scored_V, "stop_on_repetition": stop_on_repetition,
    }  # fmt: skip


def _admitted(
    shapes: Shapes,
    count: int,
    prompts: Sequence[Sequence[int]],
    budget_P: np.ndarray,
    taken: np.ndarray,
    slot: np.ndarray,
    row_keys: jax.Array,
) -> tuple:
    """What `decoding.prefill` takes for the prompts `taken`, at most `count`, in the slots `slot`."""
    longest = max(len(prompts[row]) for row in taken)
    width = min(width for width in shapes.prompt_widths if width >= longest)
    # Surplus rows of the batch aim at a slot that does not exist: the scatter drops them.
    target = np.full(count, shapes.slots, np.int32)
    tokens, length = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    budget, source = np.ones(count, np.int32), np.zeros(count, np.int32)
    used = slice(len(taken))
    target[used], source[used], budget[used] = slot, taken, budget_P[taken]
    for i, row in enumerate(taken):
        length[i] = len(prompts[row])
        tokens[i, : length[i]] = prompts[row]
    return tokens, length, length + budget, target, row_keys[source]
