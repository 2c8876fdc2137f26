"""The optimizer of a run: AdamW after clipping by the global norm, and its learning rate by step."""

from typing import Any

import jax
import optax

from opd_jax.models.decoder import LORA_A, LORA_B


def make_schedule(section: Any, steps: int) -> optax.Schedule:
    """Make the learning rate by step from the config section `optim`: linear warm-up, then `schedule`."""
    warmup_steps = section.warmup_steps or round(section.warmup_fraction * steps)
    rest = max(steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(section.learning_rate),
        "linear": optax.linear_schedule(section.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(section.learning_rate, rest),
    }[section.schedule]
    if not warmup_steps:
        return after
    first = section.learning_rate / warmup_steps  # not 0: the first step must train
    warmup = optax.linear_schedule(first, section.learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(section: Any, steps: int) -> optax.GradientTransformation:
    """Make AdamW after clipping by the global norm, from the config section `optim`."""
    adamw = optax.adamw(
        make_schedule(section, steps),
        b1=section.beta1,
        b2=section.beta2,
        weight_decay=section.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(section.grad_clip), adamw)


def _decayed(params: Any) -> Any:
    """Select the weights to decay: matrices, not norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding", LORA_A, LORA_B), params
    )
