"""One optimizer step: gradients summed over micro-batches, then Optax; every buffer is donated."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opd_jax.aot import Program
from opd_jax.data import microbatches
from opd_jax.models import decoder, low_rank
from opd_jax.sharding.mesh import ONE, ROWS, SUMS, UNREDUCED, WHOLE, Mesh
from opd_jax.training.objective import GoldenLoss, Parts, RolloutLoss
from opd_jax.training.terms import ON_GOLDEN, ON_ROLLOUTS
from opd_jax.types import Frozen, GoldenRows, RolloutRows, TrainState

Weights = Mapping[str, float]
Rows = RolloutRows | GoldenRows | None
# Kept in float32 and cast per chunk: their gradients sum over all tokens and need float32 accumulation.
_OF_MANY_TOKENS = ("embed", "head")
Accumulate = Callable[
    [Any, Frozen, RolloutRows | None, GoldenRows | None, Weights],
    tuple[Any, dict[str, jax.Array]],
]


class Inputs(NamedTuple):
    """Inputs of an update besides the state: frozen weights, rows of both kinds, weights of the terms."""

    frozen: Frozen
    rollout_rows: RolloutRows | None
    golden_rows: GoldenRows | None
    weights: Weights


def applied(state: TrainState) -> int:
    """Return the number of updates that the optimizer has applied, by its own count.

    The schedule reads this count: the next update has the learning rate `schedule(applied(state))`.
    `state.step` equals it. (In older checkpoints `step` also counts updates that were left out.)
    """
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return int(jax.device_get(counts[0][1]))


def init_state(
    params: decoder.Params, tx: optax.GradientTransformation, *, average: bool = False
) -> TrainState:
    """Return the state before the first update. It reuses float32 `params`, which the first update donates.

    `average` adds a moving average of the weights, which starts at the weights.
    """
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        average=jax.tree.map(jnp.copy, params) if average else None,
    )


@dataclasses.dataclass(frozen=True)
class Gradients:
    """gradients(params, frozen, rollout_rows, golden_rows, weights) -> (gradient, loss and its parts).

    Rows (host arrays) are processed in micro-batches of similar length (microbatches.split). Because every
    token carries its weight in the global mean, the sum of their gradients is the gradient of the whole
    batch. Each replica of a mesh sums the gradients of its own rows; these are reduced once, at the end.
    `weights` (by term) are arguments of the compiled function: new values cost no compilation, and rows all
    of whose terms have weight 0 are skipped.
    """

    on_rollouts: Callable | None
    on_golden: Callable | None
    microbatch_tokens: int
    mesh: Mesh = ONE
    tile: int = 1  # widths are multiples of it (hardware.tile)

    def __call__(
        self,
        params: Any,
        frozen: Frozen,
        rollout_rows: RolloutRows | None,
        golden_rows: GoldenRows | None,
        weights: Weights,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Sum over all micro-batches. `params`: masters, or compute weights cast from them."""
        grads = self.mesh.zeros(params)
        sums: dict[str, jax.Array] = {}
        for _, add, rows, of_kind in self.kinds(rollout_rows, golden_rows, weights):
            if not any(of_kind.values()):
                continue
            for part in self.split(rows):
                microbatch = self.mesh.rows(microbatches.gather(rows, part))
                value, parts, grads = add(params, frozen, microbatch, of_kind, grads)
                for name, x in (parts | {"total": value}).items():
                    sums[name] = sums[name] + x if name in sums else x
        return self.mesh.reduce(grads), {"total": jnp.zeros(())} | self.mesh.total(sums)

    def split(self, rows: RolloutRows | GoldenRows) -> list[microbatches.MicroBatch]:
        """Split rows into micro-batches."""
        return microbatches.split(
            rows.length_B, width=rows.tokens_BT.shape[1], tokens=self.microbatch_tokens,
            replicas=self.mesh.replicas, tile=self.tile,
        )  # fmt: skip

    def programs(
        self, params: Any, frozen: Frozen, rollout_rows: Rows, golden_rows: Rows, weights: Weights
    ) -> list[Program]:
        """Return every program that rows of this shape need, whatever their lengths."""
        out, grads = self.mesh.gradient_programs(params)
        for name, add, rows, of_kind in self.kinds(rollout_rows, golden_rows, weights):
            for part in microbatches.shapes(
                len(rows.length_B), width=rows.tokens_BT.shape[1], tokens=self.microbatch_tokens,
                replicas=self.mesh.replicas, tile=self.tile,
            ):  # fmt: skip
                microbatch = self.mesh.row_structs(microbatches.gather(rows, part))
                args = (params, frozen, microbatch, of_kind, grads)
                out.append(Program(f"gradient on {name} {part.count} x {part.width}", add, args))
        return out

    def kinds(
        self, rollout_rows: Rows, golden_rows: Rows, weights: Weights
    ) -> list[tuple[str, Callable, Any, Weights]]:
        """Return name, program, rows and weights of each kind of rows that is present."""
        return [
            (name, add, rows, {term: weights[term] for term in terms})
            for name, add, terms, rows in (
                ("rollouts", self.on_rollouts, ON_ROLLOUTS, rollout_rows),
                ("golden", self.on_golden, ON_GOLDEN, golden_rows),
            )
            if add is not None and rows is not None
        ]


def make_accumulate(
    rollout_loss: RolloutLoss | None,
    golden_loss: GoldenLoss | None,
    *,
    microbatch_tokens: int,
    dtype: jnp.dtype,
    mesh: Mesh = ONE,
    tile: int = 1,
    adapters: bool = False,
) -> Gradients:
    """Make the gradient of the losses; see `Gradients`.

    The forward and backward passes compute in `dtype`; master weights and gradients are float32. `adapters`:
    the gradient is that of adapters, beside the weights that `Frozen.base` holds.
    """
    make = make_adapter_add if adapters else make_add
    return Gradients(
        on_rollouts=make(rollout_loss, dtype, mesh) if rollout_loss else None,
        on_golden=make(golden_loss, dtype, mesh) if golden_loss else None,
        microbatch_tokens=microbatch_tokens,
        mesh=mesh,
        tile=tile,
    )


@dataclasses.dataclass(frozen=True)
class Update:
    """update(state, frozen, rollout_rows, golden_rows, weights) -> (state, metrics); `state` is donated.

    A non-finite loss or gradient leaves the state unchanged, its `step` included, as does a gradient
    whose norm exceeds `limit`; `loss/total` and `optim/grad_norm` show it.
    """

    accumulate: Accumulate
    apply: Callable
    mesh: Mesh = ONE

    def __call__(
        self,
        state: TrainState,
        frozen: Frozen,
        rollout_rows: RolloutRows | None,
        golden_rows: GoldenRows | None,
        weights: Weights,
        student: Any = None,
        limit: float | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take one optimizer step. `student`: compute weights cast from the state's, where they exist."""
        params = state.params if student is None else student
        grads, sums = self.accumulate(params, frozen, rollout_rows, golden_rows, weights)
        limits = () if limit is None else (np.float32(limit),)
        state, norm = self.apply(state, grads, sums["total"], *limits)
        metrics = {f"loss/{name}": value for name, value in sums.items()}
        return state, metrics | {"optim/grad_norm": norm}

    def program(self, state: TrainState, *, limited: bool = False) -> Program:
        """Return the program that follows the gradient; `limited`: where its norm has a limit."""
        limits = (np.float32(np.inf),) if limited else ()
        total = self.mesh.structs(jax.ShapeDtypeStruct((), jnp.float32), self.mesh.replicated)
        return Program("optimizer", self.apply, (state, state.params, total, *limits))


def make_update(
    tx: optax.GradientTransformation,
    accumulate: Accumulate,
    *,
    decay: float = 0.0,
    every: int = 0,
    mesh: Mesh = ONE,
) -> Update:
    """Make the step of the optimizer `tx` on the gradient of `accumulate`.

    `decay` is that of the moving average, where the state has one. With `every` above 0 the state's
    `average` is a copy of the weights instead, made after each so many applied updates. On a mesh each
    device updates its shard of the masters, the optimizer's state and the average.
    """

    @partial(jax.jit, donate_argnums=(0,))
    @jax.named_scope("adamw")
    def apply(
        state: TrainState, grads: Any, total: jax.Array, limit: jax.Array | None = None
    ) -> tuple[TrainState, jax.Array]:
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None and every:
            due = (state.step + 1) % every == 0
            average = jax.tree.map(lambda a, w: jnp.where(due, w, a), average, params)
        elif average is not None:
            average = jax.tree.map(lambda a, w: decay * a + (1.0 - decay) * w, average, params)
        new = TrainState(state.step + 1, params, opt_state, average)
        applied = jnp.isfinite(norm) & jnp.isfinite(total)
        if limit is not None:
            applied &= norm <= limit
        new = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)
        return mesh.constrain(new, mesh.masters(new)), norm

    return Update(accumulate, apply, mesh)


def term_gradients(
    accumulate: Accumulate,
    params: Any,
    frozen: Frozen,
    rollout_rows: RolloutRows | None,
    golden_rows: GoldenRows | None,
    weights: Weights,
) -> dict[str, jax.Array]:
    """Return the norm of each weighted term's gradient, and the cosine between every two of them.

    `optim/grad_norm_NAME`, `optim/grad_cosine_NAME_OTHER`. This takes one more pass per term, through the
    functions that the update has compiled, and holds one gradient each in memory. With a single term: {}.
    """
    present = [name for name, weight in weights.items() if weight]
    if len(present) < 2:
        return {}
    grads, out = {}, {}
    for name in present:
        alone = {other: weights[other] if other == name else 0.0 for other in weights}
        grads[name], _ = accumulate(params, frozen, rollout_rows, golden_rows, alone)
        out[f"optim/grad_norm_{name}"] = _norm(grads[name])
    for one, other in itertools.combinations(present, 2):
        norms = (out[f"optim/grad_norm_{name}"] for name in (one, other))
        out[f"optim/grad_cosine_{one}_{other}"] = _cosine(grads[one], grads[other], *norms)
    return out


@jax.jit
def _norm(gradient: Any) -> jax.Array:
    return optax.tree.norm(gradient)


@jax.jit
def _cosine(one: Any, other: Any, norm: jax.Array, other_norm: jax.Array) -> jax.Array:
    scale = norm * other_norm
    dot = optax.tree.vdot(one, other)
    return jnp.where(scale > 0, dot / jnp.where(scale > 0, scale, 1.0), 0.0)


def make_add(loss: Callable, dtype: jnp.dtype, mesh: Mesh = ONE) -> Callable:
    """Make (params, frozen, rows, weights, grads) -> (loss, its parts, grads + its gradient); donates grads.

    On a mesh every replica computes them on its own rows; loss, parts and grads have one entry per replica.
    """

    def compute(own: Any, sums: Any, rest: tuple) -> tuple[jax.Array, Parts]:
        layers, frozen, rows, weights = rest
        params = _in(dtype, own) | {name: own[name] for name in _OF_MANY_TOKENS if name in own}
        if layers:
            return loss(params | {"layers": layers}, frozen, rows, weights, sums)
        return loss(params, frozen, rows, weights)

    def own_gradient(params: Any, frozen: Frozen, rows: Any, weights: Any, grads: Any) -> tuple:
        # The decoder adds the gradients of the layers (models/layer_gradients.py), this the others.
        own, grads = dict(params), dict(grads)
        own |= {name: _in(jnp.float32, own[name]) for name in _OF_MANY_TOKENS if name in own}
        layers, sums = own.pop("layers", {}), grads.pop("layers", {})
        (value, parts), (new, sums) = jax.value_and_grad(compute, argnums=(0, 1), has_aux=True)(
            own, sums, (layers, frozen, rows, weights)
        )
        grads = jax.tree.map(jnp.add, grads, new) | ({"layers": sums} if layers else {})
        return value, parts, grads

    return _added(own_gradient, mesh)


def make_adapter_add(loss: Callable, dtype: jnp.dtype, mesh: Mesh = ONE) -> Callable:
    """As `make_add`, for adapters: `params` and `grads` are theirs, and `frozen` holds their base.

    The gradients of all layers are stacked before they are added: of adapters that is little memory.
    """

    def own_gradient(params: Any, frozen: Frozen, rows: Any, weights: Any, grads: Any) -> tuple:
        def compute(adapters: Any) -> tuple[jax.Array, Parts]:
            joined = low_rank.join(frozen.base, _in(dtype, adapters))
            return loss(joined, frozen, rows, weights)

        masters = _in(jnp.float32, params)
        (value, parts), new = jax.value_and_grad(compute, has_aux=True)(masters)
        return value, parts, jax.tree.map(jnp.add, grads, new)

    return _added(own_gradient, mesh)


def _added(own_gradient: Callable, mesh: Mesh) -> Callable:
    """Compile `own_gradient` of one replica for all replicas; donates the sum of gradients."""

    @partial(jax.jit, donate_argnums=(4,))
    def add_gradient(params: Any, frozen: Frozen, rows: Any, weights: Any, grads: Any) -> tuple:
        per_replica = mesh.per_replica(
            own_gradient, (WHOLE, WHOLE, ROWS, WHOLE, SUMS), (UNREDUCED, UNREDUCED, SUMS)
        )
        value, parts, grads = per_replica(params, frozen, rows, weights, grads)
        return value, parts, mesh.constrain(grads, mesh.unreduced(params))

    return add_gradient


def _in(dtype: Any, params: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), params)
