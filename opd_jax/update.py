"""One optimizer step: gradients summed over micro-batches, then Optax, jitted with the state donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax import scoring
from opd_jax.models import decoder
from opd_jax.objectives import GoldenLoss, RolloutLoss
from opd_jax.types import GoldenRows, RolloutRows, TrainState

Update = Callable[
    [TrainState, decoder.Params | None, RolloutRows | None, GoldenRows | None],
    tuple[TrainState, dict[str, jax.Array]],
]


def make_schedule(section: Any, steps: int) -> optax.Schedule:
    """Learning rate by step from the config section `optim`: linear warm-up, then the named schedule."""
    rest = max(steps - section.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(section.learning_rate),
        "linear": optax.linear_schedule(section.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(section.learning_rate, rest),
    }[section.schedule]
    if not section.warmup_steps:
        return after
    first = section.learning_rate / section.warmup_steps  # not 0: the first step counts
    warmup = optax.linear_schedule(first, section.learning_rate, section.warmup_steps)
    return optax.join_schedules([warmup, after], [section.warmup_steps])


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


def init_state(params: decoder.Params, tx: optax.GradientTransformation) -> TrainState:
    """State at step 0 with float32 master weights."""
    params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def make_update(
    tx: optax.GradientTransformation,
    rollout_loss: RolloutLoss | None,
    golden_loss: GoldenLoss | None,
    *,
    microbatch_tokens: int,
    dtype: jnp.dtype,
) -> Update:
    """update(state, reference, rollout_rows, golden_rows) -> (state, metrics), jitted; `state` is donated.

    Rows go through in micro-batches of at most `microbatch_tokens` (one row at least); because every
    token carries its share of the global mean, the sum of their gradients is the gradient of the
    whole batch. The forward and backward passes compute in `dtype`; master weights and gradients are
    float32. A non-finite gradient leaves parameters and optimizer untouched and is reported as
    `optim/grad_norm`.
    """

    def update(
        state: TrainState,
        reference: decoder.Params | None,
        rollout_rows: RolloutRows | None,
        golden_rows: GoldenRows | None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        total, grads = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        parts: dict[str, jax.Array] = {}
        batches: list[tuple[Callable, Any]] = []
        if rollout_loss is not None and rollout_rows is not None:
            on_policy = rollout_loss
            batches.append((lambda params, rows: on_policy(params, reference, rows), rollout_rows))
        if golden_loss is not None and golden_rows is not None:
            batches.append((golden_loss, golden_rows))
        for loss, rows in batches:
            value, some, grads = _accumulate(
                loss, state.params, rows, grads, microbatch_tokens, dtype
            )
            total, parts = total + value, parts | some
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {f"loss/{name}": value for name, value in parts.items()}
        metrics |= {"loss/total": total, "optim/grad_norm": norm}
        return new.replace(step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=(0,))


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices: not for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def _accumulate(
    loss: Callable, params: Any, rows: Any, grads: Any, microbatch_tokens: int, dtype: jnp.dtype
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Add the gradient of `loss` over all rows to `grads`; also its value and parts."""
    rows = scoring.split_rows(rows, microbatch_tokens)

    def compute(master: Any, micro: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(jax.tree.map(lambda w: w.astype(dtype), master), micro)

    def one(carry: tuple, micro: Any) -> tuple[tuple, None]:
        value_and_parts, new_grads = jax.value_and_grad(compute, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, carry, (value_and_parts, new_grads)), None

    shapes = jax.eval_shape(compute, params, jax.tree.map(lambda x: x[0], rows))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    ((value, parts), grads), _ = jax.lax.scan(one, (zero, grads), rows)
    return value, parts, grads
