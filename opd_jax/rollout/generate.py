"""Generation with continuous batching: a host loop around jitted prefill and decode programs.

The decode state (rows, caches, keys) stays on the device and is donated from call to call, so
caches are updated in place. Between chunks of decode steps the host copies finished rows out and
prefills waiting prompts into the free slots. A sample depends on its prompt, its settings and its
key, and not on slots, chunks or the other rows: exactly on a CPU, and up to the rounding of other kernels on
a GPU (docs/first_day.md).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.aot import Program
from opd_jax.data.microbatches import width_of
from opd_jax.errors import DataError
from opd_jax.models import decoder
from opd_jax.models.config import ModelConfig
from opd_jax.models.decoder import Model
from opd_jax.rollout import decode_state
from opd_jax.rollout.sampling import SamplingParams
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.types import Rollout

_PREFILL_TOKENS = 16_384  # tokens of a large prefill batch (`many` rows), per replica


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Array shapes of a generation. They do not depend on the prompts, so that few programs are compiled.

    All counts are per replica.

    Attributes:
      replicas: number of replicas of the mesh.
      slots: number of sequences decoded concurrently.
      total: tokens per row, prompt and response together.
      prompt_widths: possible widths of a prefill batch: quarters of the longest prompt allowed, rounded up
        to the tile, at most `total`.
      many, few: rows of a prefill batch, when many slots are free (as at the start) and when few are.
      chunk: decode steps between two checks by the host.
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
        tile: int = 1,
    ) -> "Shapes":
        """Return the shapes for `prompts` prompts; see `Batching` for `slots`, `chunk` and `tile`."""
        slots = -(-min(slots or prompts, prompts) // replicas)
        total = prompt_tokens + response_tokens
        widths = {min(width_of(i, prompt_tokens, tile), total) for i in (1, 2, 3, 4)}
        few = -(-slots // 16)
        return cls(
            replicas=replicas,
            slots=slots,
            total=total,
            prompt_widths=tuple(sorted(widths)),
            many=max(min(_PREFILL_TOKENS // prompt_tokens, slots), few),
            few=few,
            chunk=chunk or min(max(response_tokens // 16, 8), 128),
        )


@dataclasses.dataclass(frozen=True)
class Batching:
    """Batching of prompts while they decode. Samples do not depend on it.

    Attributes:
      slots: number of sequences decoded concurrently (vLLM: max_num_seqs); None for all prompts.
      max_prompt_tokens: longest prompt allowed. It fixes the width of the rows, so that batches of other
        prompts use the same compiled programs; None for the longest prompt of the batch.
      largest_budget: most response tokens of any call. It fixes the width of the rows likewise, so that
        other budgets use the same compiled programs; None for the largest budget of the batch.
      chunk: decode steps between two checks by the host; None for 1/16 of the budget, 8 to 128.
      mesh: devices that hold the weights; slots are divided among its replicas.
      tile: widths of prefill batches are multiples of it (hardware.tile).
    """

    slots: int | None = None
    max_prompt_tokens: int | None = None
    largest_budget: int | None = None
    chunk: int | None = None
    mesh: Mesh = ONE
    tile: int = 1

    def shapes(self, prompts: int, prompt_tokens: int, response_tokens: int) -> Shapes:
        """Return the shapes of a generation of `prompts` prompts."""
        return Shapes.of(
            prompts, slots=self.slots, prompt_tokens=prompt_tokens,
            response_tokens=response_tokens, chunk=self.chunk, replicas=self.mesh.replicas,
            tile=self.tile,
        )  # fmt: skip


ALL_AT_ONCE = Batching()  # every prompt has a slot


def generate(
    params: decoder.Params,
    model_config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    max_response_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    slots: int | None = None,
) -> Rollout:
    """Sample one response per prompt: `sample_responses` with the common settings as keyword arguments.

    Row i samples with keys derived from (key, i, position). See `sample_responses`, `SamplingParams`
    and `Batching` for the arguments. This form is meant for notebooks and scripts.
    """
    sampling = SamplingParams(
        max_response_tokens, temperature=temperature, top_p=top_p, stop_ids=tuple(stop_ids)
    )
    return sample_responses(
        Model(model_config, params), prompts, sampling,
        keys=row_keys(key, len(prompts)), batching=Batching(slots=slots),
    )  # fmt: skip


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Return one PRNG key per row of a batch: fold_in(key, i) for row i."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))


def sample_responses(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    keys: jax.Array,
    batching: Batching = ALL_AT_ONCE,
    on_finished: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample one response per prompt.

    Args:
      model: model with stacked parameters, in the dtype to compute in.
      prompts: token ids, at least one per prompt.
      keys: PRNG keys [prompts]; row i samples with keys derived from (keys[i], position).
      on_finished: called with the number of finished responses whenever that number grows.

    Returns: `Rollout` in the order of the prompts, with rows of max_prompt_tokens + the largest budget, or
    that of `batching`.

    Raises DataError if there are no prompts, if a prompt is empty or too long or has token ids that the
    model lacks, if a budget is below 1, if rows need more positions than the model has, or if the
    repetition rule is invalid.
    """
    width = batching.max_prompt_tokens or max(map(len, prompts), default=0)
    budget_P = np.broadcast_to(np.asarray(sampling.max_response_tokens, np.int32), len(prompts))
    budget = batching.largest_budget or int(budget_P.max(initial=0))
    _check(prompts, width, budget_P, budget, model.config)
    stop_on_repetition, mesh = sampling.stop_on_repetition, batching.mesh
    if stop_on_repetition < 0 or (stop_on_repetition and sampling.repetition_period < 1):
        raise DataError(
            f"stop_on_repetition={stop_on_repetition} with "
            f"repetition_period={sampling.repetition_period} is invalid; set stop_on_repetition=0 (off), "
            "or a positive number of tokens and a period of at least 1"
        )
    shapes = batching.shapes(len(prompts), width, budget)
    unstacked = decode_state.unstack(model, mesh)
    key_P2 = np.asarray(jax.random.key_data(keys))
    state = decode_state.empty(unstacked, shapes.slots, shapes.total, sampling.periods, mesh)
    owner = np.full(
        (shapes.replicas, shapes.slots), -1
    )  # index of the prompt in each slot, -1 = free
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
            targets = _assign(owner, waiting, count)
            batch = _prefill_batch(shapes, count, prompts, budget_P, key_P2, owner, targets)
            state = decode_state.prefill(unstacked, state, mesh.rows(batch), mesh=mesh)
        share = -(-len(waiting) // shapes.replicas)
        few_live = shapes.slots - min(shapes.few, share) if waiting else 0
        state = decode_state.decode_chunk(
            unstacked, state, np.int32(few_live), _static_settings(sampling),
            steps=shapes.chunk, mesh=mesh,
        )  # fmt: skip
        if _copy_finished(out, owner, state, stop_on_repetition, mesh) and on_finished is not None:
            on_finished(int((out.length_B > 0).sum()))
    return out


def _copy_finished(
    out: Rollout, owner: np.ndarray, state: decode_state.Slots, stop_on_repetition: int, mesh: Mesh
) -> bool:
    """Copy finished sequences to `out` and free their slots. Returns whether any finished."""
    owner_B = owner.reshape(-1)  # a view: assignments below change `owner`
    slots = np.flatnonzero(~mesh.fetch(state.live_B) & (owner_B >= 0))
    if not len(slots):
        return False
    host = mesh.fetch(state.replace(caches=(), key_B=None))
    rows = owner_B[slots]
    out.tokens_BT[rows] = host.tokens_BT[slots]
    out.length_B[rows] = host.length_B[slots]
    out.sampler_logprob_BT[rows] = host.logprob_BT[slots]
    out.outcome_B[rows] = decode_state.outcomes(host, stop_on_repetition)[slots]
    owner_B[slots] = -1
    return True


def _to_admit(shapes: Shapes, owner: np.ndarray, waiting: int) -> int:
    """Return the rows that each replica prefills now: `many`, `few` or 0, depending on free slots."""
    free = int((owner < 0).sum(axis=1).max())
    share = -(-waiting // shapes.replicas)
    if not waiting or free < min(shapes.few, share):
        return 0
    return shapes.many if min(free, share) >= shapes.many else shapes.few


def _assign(owner: np.ndarray, waiting: list[int], count: int) -> list[np.ndarray]:
    """Assign waiting prompts to free slots, replica by replica in turn, at most `count` per replica.

    Updates `owner` and `waiting`, and returns the assigned slots of each replica.
    """
    free = [np.flatnonzero(slots < 0)[:count] for slots in owner]
    counts = [0] * len(owner)
    for turn in range(count):
        for replica, slots in enumerate(free):
            if waiting and turn < len(slots):
                owner[replica, slots[turn]] = waiting.pop()
                counts[replica] += 1
    return [slots[:n] for slots, n in zip(free, counts, strict=True)]


def programs(
    model: Model, prompts: int, sampling: SamplingParams, *, batching: Batching
) -> list[Program]:
    """Return every program that `sample_responses` compiles for `prompts` prompts with these settings.

    The parameters may be shapes and dtypes alone. All prompts have the same budget, and
    `batching.max_prompt_tokens` must be set.
    """
    assert batching.max_prompt_tokens is not None
    assert isinstance(sampling.max_response_tokens, int)
    mesh = batching.mesh
    shapes = batching.shapes(prompts, batching.max_prompt_tokens, sampling.max_response_tokens)
    state_shape = (shapes.slots, shapes.total, sampling.periods, mesh)
    unstacked = jax.eval_shape(lambda model: decode_state.unstack(model, mesh), model)
    layers = mesh.structs(unstacked.params, mesh.weights(unstacked.params))
    unstacked = unstacked.replace(params=layers)
    state = jax.eval_shape(lambda model: decode_state.empty(model, *state_shape), unstacked)
    state = mesh.structs(state, decode_state.slot_places(state, mesh))
    out = [
        Program("unstack", decode_state.unstack, (model, mesh)),
        Program("empty slots", decode_state.empty, (unstacked, *state_shape)),
    ]
    for count in _prefill_counts(shapes, prompts):
        rows = count * shapes.replicas
        row = jax.ShapeDtypeStruct((rows,), jnp.int32)
        key_B2 = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct((rows,), state.key_B.dtype)
        )
        for width in shapes.prompt_widths:
            tokens_BT = jax.ShapeDtypeStruct((rows, width), jnp.int32)
            batch = decode_state.Admitted(tokens_BT, row, row, row, key_B2)
            arguments = (unstacked, state, mesh.row_structs(batch))
            name = f"prefill {rows} x {width}"
            out.append(Program(name, decode_state.prefill, arguments, {"mesh": mesh}))
    few_live = jax.ShapeDtypeStruct((), jnp.int32)
    decode_arguments = (unstacked, state, few_live, _static_settings(sampling))
    settings = {"steps": shapes.chunk, "mesh": mesh}
    name = f"decode {shapes.slots * shapes.replicas} x {shapes.total}"
    out.append(Program(name, decode_state.decode_chunk, decode_arguments, settings))
    return out


def _prefill_counts(shapes: Shapes, prompts: int) -> list[int]:
    """Return the rows of a replica's prefill batches, as `_to_admit` finds them, in ascending order.

    The first prompts fill all slots: `many` rows at a time, then `few` where fewer than `many` are left.
    Prompts without a slot at the start are admitted `few` at a time, or `many` after many have finished.
    """
    share = -(-prompts // shapes.replicas)
    waits = share > shapes.slots
    left = min(share, shapes.slots) % shapes.many
    return sorted({shapes.many, shapes.few} if waits or left else {shapes.many})


def _check(
    prompts: Sequence[Sequence[int]],
    width: int,
    budget_P: np.ndarray,
    largest: int,
    config: ModelConfig,
) -> None:
    """Raise DataError if a prompt or a budget does not fit the model or the width of the rows."""
    if not prompts:
        raise DataError("generate: there are no prompts; pass at least one")
    if budget_P.min() < 1:
        raise DataError(f"max_response_tokens={budget_P.min()} must be at least 1")
    if budget_P.max() > largest:
        raise DataError(
            f"max_response_tokens={budget_P.max()} is more than the {largest} response tokens of a row; "
            "lower it, or raise Batching.largest_budget"
        )
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= width:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens, but 1 to max_prompt_tokens={width} are allowed; "
                "raise --config.rollout.max_prompt_tokens or shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise DataError(
                f"prompt {i} has token ids {min(prompt)} to {max(prompt)}, but the model's are 0 to "
                f"{config.vocab_size - 1}; use the model's own tokenizer"
            )
    if width + largest > config.max_position:
        raise DataError(
            f"prompt ({width}) + response ({largest}) tokens exceed the model's "
            f"{config.max_position} positions; lower the response budget or "
            "--config.rollout.max_prompt_tokens"
        )


def _static_settings(sampling: SamplingParams) -> SamplingParams:
    """Reset budgets and repetition period, which the state's arrays hold, to avoid recompilation."""
    return sampling.replace(max_response_tokens=0, repetition_period=0)


def _prefill_batch(
    shapes: Shapes,
    count: int,
    prompts: Sequence[Sequence[int]],
    budget_P: np.ndarray,
    key_P2: np.ndarray,
    owner: np.ndarray,
    targets: list[np.ndarray],
) -> decode_state.Admitted:
    """Return a prefill batch of `count` rows per replica for the slots in `targets`, a list per replica."""
    longest = max(len(prompts[owner[r, s]]) for r, slots in enumerate(targets) for s in slots)
    width = min(width for width in shapes.prompt_widths if width >= longest)
    # Padding rows of the batch target a slot that does not exist: the scatter drops them.
    rows = count * shapes.replicas
    target = np.full(rows, shapes.slots, np.int32)
    tokens, length = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    budget, source = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for replica, slots in enumerate(targets):
        for i, slot in enumerate(slots, start=replica * count):
            target[i], source[i] = slot, owner[replica, slot]
            prompt = prompts[source[i]]
            length[i], budget[i] = len(prompt), budget_P[source[i]]
            tokens[i, : len(prompt)] = prompt
    return decode_state.Admitted(tokens, length, length + budget, target, key_P2[source])
