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
from opd_jax.models import decoder
from opd_jax.sharding.mesh import APART, ONE, ROWS, SUMS, WHOLE, Mesh
from opd_jax.training.objective import ON_GOLDEN, ON_ROLLOUTS, GoldenLoss, Parts, RolloutLoss
from opd_jax.types import Frozen, GoldenRows, RolloutRows, TrainState

Weights = Mapping[str, float]
Rows = RolloutRows | GoldenRows | None
# Cast where they are used, so that their gradients, sums over many tokens, add up in float32.
_OF_MANY_TOKENS = ("embed", "head")
Accumulate = Callable[
    [Any, Frozen, RolloutRows | None, GoldenRows | None, Weights],
    tuple[Any, dict[str, jax.Array]],
]


class Inputs(NamedTuple):
    """What an update reads beside the state: frozen weights, rows of both kinds, weights of the terms."""

    frozen: Frozen
    rollout_rows: RolloutRows | None
    golden_rows: GoldenRows | None
    weights: Weights


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
    """State before the first update. It takes over float32 `params`: the first update donates their buffers.

    `average` starts a moving average of the weights, at the weights.
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

    Rows (host arrays) go through in micro-batches of like length (batching.split); because every
    token carries its share of the global mean, the sum of their gradients is the gradient of the
    whole batch. Replicas of a mesh sum their own rows' gradients apart; those are summed once, at
    the end. `weights` (by term) are arguments of the compiled function: other ones cost no
    compilation, and rows all of whose terms have weight 0 are not passed through.
    """

    on_rollouts: Callable | None
    on_golden: Callable | None
    microbatch_tokens: int
    mesh: Mesh = ONE

    def __call__(
        self,
        params: Any,
        frozen: Frozen,
        rollout_rows: RolloutRows | None,
        golden_rows: GoldenRows | None,
        weights: Weights,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The sum over all micro-batches. `params`: masters, or compute weights made of them."""
        grads = self.mesh.zeros(params)
        sums: dict[str, jax.Array] = {}
        for _, add, rows, mine in self.kinds(rollout_rows, golden_rows, weights):
            if not any(mine.values()):
                continue
            for part in self.split(rows):
                taken = self.mesh.rows(microbatches.gather(rows, part))
                value, parts, grads = add(params, frozen, taken, mine, grads)
                for name, x in (parts | {"total": value}).items():
                    sums[name] = sums[name] + x if name in sums else x
        return self.mesh.summed(grads), {"total": jnp.zeros(())} | self.mesh.total(sums)

    def split(self, rows: RolloutRows | GoldenRows) -> list[microbatches.MicroBatch]:
        """The micro-batches that rows are passed through in."""
        return microbatches.split(
            rows.length_B, width=rows.tokens_BT.shape[1], tokens=self.microbatch_tokens,
            replicas=self.mesh.replicas,
        )  # fmt: skip

    def programs(
        self, params: Any, frozen: Frozen, rollout_rows: Rows, golden_rows: Rows, weights: Weights
    ) -> list[Program]:
        """All that is compiled for rows like these, whatever their lengths."""
        out, grads = self.mesh.gradient_programs(params)
        for name, add, rows, mine in self.kinds(rollout_rows, golden_rows, weights):
            for part in microbatches.shapes(
                len(rows.length_B), width=rows.tokens_BT.shape[1], tokens=self.microbatch_tokens,
                replicas=self.mesh.replicas,
            ):  # fmt: skip
                taken = self.mesh.row_structs(microbatches.gather(rows, part))
                given = (params, frozen, taken, mine, grads)
                out.append(Program(f"gradient on {name} {part.count} x {part.width}", add, given))
        return out

    def kinds(
        self, rollout_rows: Rows, golden_rows: Rows, weights: Weights
    ) -> list[tuple[str, Callable, Any, Weights]]:
        """Name, program, rows and weights of each kind of rows that there is."""
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
) -> Gradients:
    """The gradient of the losses; see `Gradients`.

    The forward and backward passes compute in `dtype`; master weights and gradients are float32.
    """
    return Gradients(
        on_rollouts=make_add(rollout_loss, dtype, mesh) if rollout_loss else None,
        on_golden=make_add(_without_frozen(golden_loss), dtype, mesh) if golden_loss else None,
        microbatch_tokens=microbatch_tokens,
        mesh=mesh,
    )


@dataclasses.dataclass(frozen=True)
class Update:
    """update(state, frozen, rollout_rows, golden_rows, weights) -> (state, metrics); `state` is donated.

    A non-finite loss or gradient leaves the whole state untouched, its `step` included, as does a
    gradient whose norm is beyond `limit`; `loss/total` and `optim/grad_norm` tell.
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
        """One optimizer step. `student`: compute weights made of the state's, where there are such."""
        params = state.params if student is None else student
        grads, sums = self.accumulate(params, frozen, rollout_rows, golden_rows, weights)
        most = () if limit is None else (np.float32(limit),)
        state, norm = self.apply(state, grads, sums["total"], *most)
        metrics = {f"loss/{name}": value for name, value in sums.items()}
        return state, metrics | {"optim/grad_norm": norm}

    def program(self, state: TrainState, *, limited: bool = False) -> Program:
        """What follows the gradient; `limited`: where its norm has a limit."""
        most = (np.float32(np.inf),) if limited else ()
        total = self.mesh.structs(jax.ShapeDtypeStruct((), jnp.float32), self.mesh.whole)
        return Program("optimizer", self.apply, (state, state.params, total, *most))


def make_update(
    tx: optax.GradientTransformation,
    accumulate: Accumulate,
    *,
    decay: float = 0.0,
    mesh: Mesh = ONE,
) -> Update:
    """The step of the optimizer `tx` on the gradient of `accumulate`.

    `decay` is that of the moving average, where the state has one. On a mesh each device updates
    its part of the masters, the optimizer's state and the average.
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
        if average is not None:
            average = jax.tree.map(lambda a, w: decay * a + (1.0 - decay) * w, average, params)
        new = TrainState(state.step + 1, params, opt_state, average)
        taken = jnp.isfinite(norm) & jnp.isfinite(total)
        if limit is not None:
            taken &= norm <= limit
        new = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, state)
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
    """Norm of each weighted term's gradient, and the cosine between every two of them.

    `optim/grad_norm_NAME`, `optim/grad_cosine_NAME_OTHER`. One more pass a term and one gradient each
    in memory, through the functions that the update has compiled. Without one term to compare: {}.
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
    """(params, frozen, rows, weights, grads) -> (loss, its parts, grads + its gradient); donates grads.

    On a mesh every replica does so on its own rows; loss, parts and grads are one a replica.
    """

    def compute(own: Any, sums: Any, rest: tuple) -> tuple[jax.Array, Parts]:
        layers, frozen, rows, weights = rest
        params = _in(dtype, own) | {name: own[name] for name in _OF_MANY_TOKENS if name in own}
        if layers:
            parts = loss(params | {"layers": layers}, frozen, rows, sums)
        else:
            parts = loss(params, frozen, rows)
        return sum((weights[name] * x for name, x in parts.items()), jnp.zeros(())), parts

    def own_gradient(params: Any, frozen: Frozen, rows: Any, weights: Any, grads: Any) -> tuple:
        # The layers' gradients are added by the decoder (models/summing.py), the others' here.
        own, grads = dict(params), dict(grads)
        own |= {name: _in(jnp.float32, own[name]) for name in _OF_MANY_TOKENS if name in own}
        layers, sums = own.pop("layers", {}), grads.pop("layers", {})
        (value, parts), (new, sums) = jax.value_and_grad(compute, argnums=(0, 1), has_aux=True)(
            own, sums, (layers, frozen, rows, weights)
        )
        grads = jax.tree.map(jnp.add, grads, new) | ({"layers": sums} if layers else {})
        return value, parts, grads

    @partial(jax.jit, donate_argnums=(4,))
    def add_gradient(params: Any, frozen: Frozen, rows: Any, weights: Any, grads: Any) -> tuple:
        each = mesh.each(own_gradient, (WHOLE, WHOLE, ROWS, WHOLE, SUMS), (APART, APART, SUMS))
        value, parts, grads = each(params, frozen, rows, weights, grads)
        return value, parts, mesh.constrain(grads, mesh.apart(params))

    return add_gradient


def _in(dtype: Any, params: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _without_frozen(loss: GoldenLoss) -> Callable:
    return lambda params, _, rows, *sums: loss(params, rows, *sums)


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices: not for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
