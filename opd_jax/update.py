"""One optimizer step: gradients summed over micro-batches, then Optax; every buffer is donated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax import batching
from opd_jax.models import decoder
from opd_jax.objectives import GoldenLoss, RolloutLoss
from opd_jax.types import Frozen, GoldenRows, RolloutRows, TrainState

Update = Callable[
    [TrainState, Frozen, RolloutRows | None, GoldenRows | None],
    tuple[TrainState, dict[str, jax.Array]],
]


def make_schedule(section: Any, steps: int) -> optax.Schedule:
    """Learning rate by step from the config section `optim`: linear warm-up, then the named schedule."""
    warmup_steps = section.warmup_steps or round(section.warmup_fraction * steps)
    rest = max(steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(section.learning_rate),
        "linear": optax.linear_schedule(section.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(section.learning_rate, rest),
    }[section.schedule]
    if not warmup_steps:
        return after
    first = section.learning_rate / warmup_steps  # not 0: the first step counts
    warmup = optax.linear_schedule(first, section.learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(section: Any, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, from the config section `optim`."""
    adamw = optax.adamw(
        make_schedule(section, steps),
        b1=section.beta1,
        b2=section.beta2,
        weight_decay=section.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(section.grad_clip), adamw)


def init_state(
    params: decoder.Params, tx: optax.GradientTransformation, *, average: bool = False
) -> TrainState:
    """State at step 0. It takes over float32 `params`: the first update donates their buffers.

    `average` starts a moving average of the weights, at the weights.
    """
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        average=jax.tree.map(jnp.copy, params) if average else None,
    )


def make_update(
    tx: optax.GradientTransformation,
    rollout_loss: RolloutLoss | None,
    golden_loss: GoldenLoss | None,
    *,
    microbatch_tokens: int,
    dtype: jnp.dtype,
    decay: float = 0.0,
) -> Update:
    """update(state, frozen, rollout_rows, golden_rows) -> (state, metrics); `state` is donated.

    Rows (host arrays) go through in micro-batches of like length (batching.split); because every
    token carries its share of the global mean, the sum of their gradients is the gradient of the
    whole batch. The forward and backward passes compute in `dtype`; master weights and gradients are
    float32. `decay` is that of the moving average, where the state has one. A non-finite gradient
    leaves parameters and optimizer untouched and is reported as `optim/grad_norm`.
    """
    accumulate = {
        "rollout": _make_accumulate(rollout_loss, dtype) if rollout_loss else None,
        "golden": _make_accumulate(_on_golden(golden_loss), dtype) if golden_loss else None,
    }

    @partial(jax.jit, donate_argnums=(0,))
    def apply(state: TrainState, grads: Any, total: jax.Array) -> tuple[TrainState, jax.Array]:
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = jax.tree.map(lambda a, w: decay * a + (1.0 - decay) * w, average, params)
        new = state.replace(params=params, opt_state=opt_state, average=average)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new.replace(step=state.step + 1), norm

    def update(
        state: TrainState,
        frozen: Frozen,
        rollout_rows: RolloutRows | None,
        golden_rows: GoldenRows | None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = _zeros_like(state.params), {"total": jnp.zeros(())}
        for kind, rows in (("rollout", rollout_rows), ("golden", golden_rows)):
            add = accumulate[kind]
            if add is None or rows is None:
                continue
            for part in batching.split(
                rows.length_B,
                width=rows.tokens_BT.shape[1],
                tokens=microbatch_tokens,
                teacher=getattr(rows, "teacher", None),
            ):
                value, parts, grads = add(state.params, frozen, _gather(rows, part), grads)
                for name, x in (parts | {"total": value}).items():
                    sums[name] = sums.get(name, 0.0) + x
        state, norm = apply(state, grads, sums["total"])
        metrics = {f"loss/{name}": value for name, value in sums.items()}
        return state, metrics | {"optim/grad_norm": norm}

    return update


def _make_accumulate(loss: Callable, dtype: jnp.dtype) -> Callable:
    """(params, frozen, rows, grads) -> (loss, its parts, grads + its gradient); grads are donated."""

    def compute(master: Any, frozen: Frozen, rows: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(jax.tree.map(lambda w: w.astype(dtype), master), frozen, rows)

    @partial(jax.jit, donate_argnums=(3,))
    def accumulate(params: Any, frozen: Frozen, rows: Any, grads: Any) -> tuple:
        (value, parts), new = jax.value_and_grad(compute, has_aux=True)(params, frozen, rows)
        return value, parts, jax.tree.map(jnp.add, grads, new)

    return accumulate


def _gather(rows: Any, part: batching.MicroBatch) -> Any:
    """A micro-batch of the rows; the teacher's have a width of their own."""
    teacher = getattr(rows, "teacher", None)
    if teacher is None:
        return batching.gather(rows, part)
    taken = batching.gather(rows.replace(teacher=None), part)
    return taken.replace(teacher=batching.gather_teacher(teacher, part))


def _on_golden(loss: GoldenLoss) -> Callable:
    return lambda params, _, rows: loss(params, rows)


@jax.jit
def _zeros_like(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices: not for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
