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

from opd_jax.aot import Program
from opd_jax.errors import DataError
from opd_jax.models import decoder
from opd_jax.models.config import ModelConfig
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.rollout import decode_state
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.types import Rollout

_PREFILL_TOKENS = 16_384  # prompts that go through the model at one time


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that a generation meets, whatever its prompts: few programs are ever compiled.

    All counts are those of one replica; there are `replicas`.

    Attributes:
      replicas: of the mesh. slots: sequences decoded at one time. total: tokens of a row.
      prompt_widths: of a batch of prompts: quarters of the longest there may be.
      many, few: prompts that are prefilled at one time: at first, and as slots fall free.
      chunk: decode steps between two looks from the host.
    """

    replicas: int
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
        replicas: int = 1,
    ) -> "Shapes":
        """`slots` and `chunk` as in `generate`."""
        slots = -(-min(slots or prompts, prompts) // replicas)
        quarter = -(-prompt_tokens // 4)
        few = -(-slots // 16)
        return cls(
            replicas=replicas,
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
    events: Events = EVERY_ID,
    stop_on_repetition: int = 0,
    repetition_period: int = 16,
    chunk: int | None = None,
    on_finished: Callable[[int], None] | None = None,
    mesh: Mesh = ONE,
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
      drawn_V, events: see `sampling.sample`; drawn_V is bool [vocabulary].
      stop_on_repetition: a row ends when its last so many response tokens each equal the response
        token d before them, for one period d from 1 to `repetition_period`; 0 for never.
      chunk: decode steps between two looks from the host; None for 1/16 of the budget, 8 to 128.
      on_finished: told how many responses are finished, whenever these are more.
      mesh: the devices, on which `params` lie; slots are divided among its replicas.

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
        len(prompts), slots=slots, prompt_tokens=width, response_tokens=budget, chunk=chunk,
        replicas=mesh.replicas,
    )  # fmt: skip
    settings = _settings(
        shapes, temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=stop_ids,
        vocabulary=vocabulary, drawn_V=drawn_V, events=events,
        stop_on_repetition=stop_on_repetition,
    )  # fmt: skip
    layers = decode_state.unstack(params, mesh)
    if row_keys is None:
        assert key is not None, "generate: one of key and row_keys is wanted"
        row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prompts)))
    key_P2 = np.asarray(jax.random.key_data(row_keys))
    periods = repetition_period if stop_on_repetition else 0
    state = decode_state.empty(layers, model_config, shapes.slots, shapes.total, periods, mesh)
    owner = np.full((shapes.replicas, shapes.slots), -1)  # which prompt sits in each slot
    waiting = list(range(len(prompts)))[::-1]
    out = Rollout(
        tokens_BT=np.zeros((len(prompts), shapes.total), np.int32),
        length_B=np.zeros(len(prompts), np.int32),
        prompt_length_B=np.array([len(p) for p in prompts], np.int32),
        sampler_logprob_BT=np.zeros((len(prompts), shapes.total), np.float32),
        outcome_B=np.zeros(len(prompts), np.int32),
    )
    while waiting or (owner >= 0).any():
        while (count := _to_admit(shapes, owner, len(waiting))) > 0:
            slots_taken = _assign(owner, waiting, count)
            admitted = _admitted(shapes, count, prompts, budget_P, key_P2, owner, slots_taken)
            state = decode_state.prefill(
                layers, model_config, state, *mesh.rows(admitted), mesh=mesh
            )
        share = -(-len(waiting) // shapes.replicas)
        few_live = shapes.slots - min(shapes.few, share) if waiting else 0
        state = decode_state.decode_chunk(
            layers, model_config, state, np.int32(few_live), mesh=mesh, **settings
        )
        if _take_out(out, owner, state, stop_on_repetition, mesh) and on_finished is not None:
            on_finished(int((out.length_B > 0).sum()))
    return out


def _take_out(
    out: Rollout, owner: np.ndarray, state: decode_state.Slots, stop_on_repetition: int, mesh: Mesh
) -> bool:
    """Put the rows that are done into `out`, and free their slots; whether there were any."""
    owner_B = owner.reshape(-1)  # a view
    done = np.flatnonzero(~mesh.fetch(state.live_B) & (owner_B >= 0))
    if not len(done):
        return False
    found = mesh.fetch(state.replace(caches=(), key_B=None))
    rows = owner_B[done]
    out.tokens_BT[rows] = found.tokens_BT[done]
    out.length_B[rows] = found.length_B[done]
    out.sampler_logprob_BT[rows] = found.logprob_BT[done]
    out.outcome_B[rows] = decode_state.outcomes(found, stop_on_repetition)[done]
    owner_B[done] = -1
    return True


def _to_admit(shapes: Shapes, owner: np.ndarray, waiting: int) -> int:
    """Prompts that each replica is to prefill now, `many`, `few` or none: as its free slots allow."""
    free = int((owner < 0).sum(axis=1).max())
    share = -(-waiting // shapes.replicas)
    if not waiting or free < min(shapes.few, share):
        return 0
    return shapes.many if min(free, share) >= shapes.many else shapes.few


def _assign(owner: np.ndarray, waiting: list[int], count: int) -> list[np.ndarray]:
    """Waiting prompts take free slots of `owner` in turns, `count` of a replica at most; these slots."""
    free = [np.flatnonzero(slots < 0)[:count] for slots in owner]
    taken = [0] * len(owner)
    for turn in range(count):
        for replica, slots in enumerate(free):
            if waiting and turn < len(slots):
                owner[replica, slots[turn]] = waiting.pop()
                taken[replica] += 1
    return [slots[:n] for slots, n in zip(free, taken, strict=True)]


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
    mesh: Mesh = ONE,
    **sampling: Any,
) -> list[Program]:
    """Everything that `generate` compiles for so many prompts with these settings.

    `params` may be shapes and dtypes alone.
    """
    shapes = Shapes.of(
        prompts, slots=slots, prompt_tokens=max_prompt_tokens,
        response_tokens=max_response_tokens, chunk=chunk, replicas=mesh.replicas,
    )  # fmt: skip
    periods = repetition_period if stop_on_repetition else 0
    state_shape = (model_config, shapes.slots, shapes.total, periods, mesh)
    layers = jax.eval_shape(lambda params: decode_state.unstack(params, mesh), params)
    layers = mesh.structs(layers, mesh.weights(layers))
    state = jax.eval_shape(lambda layers: decode_state.empty(layers, *state_shape), layers)
    state = mesh.structs(state, decode_state.slot_places(state, mesh))
    out = [
        Program("unstack", decode_state.unstack, (params, mesh)),
        Program("empty slots", decode_state.empty, (layers, *state_shape)),
    ]
    for count in sorted({shapes.many, shapes.few} if prompts > shapes.slots else {shapes.many}):
        rows = count * shapes.replicas
        row = jax.ShapeDtypeStruct((rows,), jnp.int32)
        key_B2 = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct((rows,), state.key_B.dtype)
        )
        for width in shapes.prompt_widths:
            tokens_BT = jax.ShapeDtypeStruct((rows, width), jnp.int32)
            admitted = mesh.row_structs((tokens_BT, row, row, row, key_B2))
            given = (layers, model_config, state, *admitted)
            name = f"prefill {rows} x {width}"
            out.append(Program(name, decode_state.prefill, given, {"mesh": mesh}))
    settings = _settings(shapes, stop_on_repetition=stop_on_repetition, **sampling)
    settings["mesh"] = mesh
    chunk_of = (layers, model_config, state, jax.ShapeDtypeStruct((), jnp.int32))
    name = f"decode {shapes.slots * shapes.replicas} x {shapes.total}"
    out.append(Program(name, decode_state.decode_chunk, chunk_of, settings))
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
            f"{config.max_position} positions; lower the budget of the response, or "
            "--config.rollout.max_prompt_tokens"
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
    events: Events = EVERY_ID,
    stop_on_repetition: int = 0,
) -> dict[str, Any]:
    """The keyword arguments of `decoding.decode_chunk`."""
    return {
        "steps": shapes.chunk, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "stop_ids": tuple(stop_ids), "vocabulary": vocabulary, "drawn_V": drawn_V,
        "events": events, "stop_on_repetition": stop_on_repetition,
    }  # fmt: skip


def _admitted(
    shapes: Shapes,
    count: int,
    prompts: Sequence[Sequence[int]],
    budget_P: np.ndarray,
    key_P2: np.ndarray,
    owner: np.ndarray,
    taken: list[np.ndarray],
) -> tuple:
    """What `decoding.prefill` takes, `count` rows a replica, for the slots `taken` of each."""
    longest = max(len(prompts[owner[r, s]]) for r, slots in enumerate(taken) for s in slots)
    width = min(width for width in shapes.prompt_widths if width >= longest)
    # Surplus rows of the batch aim at a slot that does not exist: the scatter drops them.
    rows = count * shapes.replicas
    target = np.full(rows, shapes.slots, np.int32)
    tokens, length = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    budget, source = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for replica, slots in enumerate(taken):
        for i, slot in enumerate(slots, start=replica * count):
            target[i], source[i] = slot, owner[replica, slot]
            prompt = prompts[source[i]]
            length[i], budget[i] = len(prompt), budget_P[source[i]]
            tokens[i, : len(prompt)] = prompt
    return tokens, length, length + budget, target, key_P2[source]
