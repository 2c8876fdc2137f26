"""Scoring, a full update, and only the matrix products of both, with this library and XLA.

python opd_jax/tools/bench/peers/ours_train.py --what=WHAT --model=FOLDER --batch=8 --prompt=256

WHAT is score, score_all, update, products_forward or products_update.

The rows are those of torch_train.py. `score` computes the same as torch_train.py, `score_all` everything that
training needs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timing import measure, prompts, read_case, report

Step = tuple[Callable[[], Any], dict[str, float]]


def main() -> None:
    """Time one of the five workloads, and report numbers that check the result."""
    case = read_case(
        "opd_jax scoring, update, products", what="score", teacher="", learning_rate=1e-6
    )
    import jax

    step, check = {
        "score": _score,
        "score_all": _score_all,
        "update": _update,
        "products_forward": _products,
        "products_update": _products,
    }[case.what](case)
    report(
        case,
        measure(step, case),
        tokens=case.batch * case.prompt,
        check=check,
        versions={"jax": jax.__version__},
    )


def _rows(case: Any) -> tuple:
    import numpy as np

    return np.array(prompts(case), np.int32), np.full(case.batch, case.prompt, np.int32)


def _pair(case: Any) -> list:
    import jax.numpy as jnp

    from opd_jax import models

    return [
        models.load(path, dtype=jnp.float32) for path in (case.model, case.teacher or case.model)
    ]


def _score(case: Any) -> Step:
    import jax

    from opd_jax import config as fields
    from opd_jax import scoring

    pair = _pair(case)
    chunk = fields.default().scoring.token_chunk
    tokens_BT, length_B = _rows(case)

    def step() -> list:
        out = [
            scoring.token_logprob(params, config, tokens_BT, length_B, token_chunk=chunk)
            for config, params in pair
        ]
        return jax.block_until_ready(out)

    student, teacher = (float(x_BT[:, 1:].mean()) for x_BT in step())
    return step, {"student": student, "teacher": teacher}


def _score_all(case: Any) -> Step:
    from opd_jax import config as fields
    from opd_jax import models, scoring
    from opd_jax.models.end_tokens import Events

    (student_config, student), (teacher_config, teacher) = _pair(case)
    config = fields.default()
    tokens_BT, length_B = _rows(case)
    step = partial(
        scoring.score,
        scoring.Models(models.Model(student_config, student), models.Model(teacher_config, teacher)),
        tokens_BT, length_B,
        scoring.ScoreSpec(
            config.scoring.overlap_top_k, config.scoring.token_chunk,
            Events(vocabulary=student_config.vocab_size),
        ),
        microbatch_tokens=config.optim.microbatch_tokens,
    )  # fmt: skip
    scores = step()
    return step, {
        "student": float(scores.student_logprob_BT[:, 1:].mean()),
        "teacher": float(scores.teacher_logprob_BT[:, 1:].mean()),
    }


def _update(case: Any) -> Step:
    """Forward, mean negative log-prob, backward, clipping, AdamW."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from opd_jax import config as fields
    from opd_jax import models
    from opd_jax.training import objective, optimizer, update
    from opd_jax.training.terms import default_terms
    from opd_jax.types import Frozen, GoldenRows

    optim = fields.default().unlock().optim
    optim.learning_rate = case.learning_rate
    config, params = models.load(case.model, dtype=jnp.float32)
    tx = optimizer.make_optimizer(optim, 1000)
    terms = default_terms(pg_weight=0.0, lambda_gold=1.0)
    loss = objective.make_golden_loss(
        terms, config, token_chunk=optim.token_chunk, remat=optim.remat
    )
    accumulate = update.make_accumulate(
        None, loss, microbatch_tokens=optim.microbatch_tokens, dtype=jnp.float32
    )
    apply = update.make_update(tx, accumulate)
    tokens_BT, length_B = _rows(case)
    weight_BT = np.full(tokens_BT.shape, 1 / (case.batch * (case.prompt - 1)), np.float32)
    weight_BT[:, 0] = 0.0  # the first token is not predicted
    rows = GoldenRows(tokens_BT=tokens_BT, length_B=length_B, weight_BT=weight_BT)
    states = [update.init_state(params, tx)]
    del params

    def step() -> dict[str, float]:
        state, metrics = apply(states.pop(), Frozen(), None, rows, terms.weights)
        states.append(jax.block_until_ready(state))
        return {name: float(x) for name, x in metrics.items()}

    first = step()
    return step, {"loss": first["loss/sft"], "grad_norm": first["optim/grad_norm"]}


def _products(case: Any) -> Step:
    """Run only the matrix products of a forward pass, or also the two per product of the backward pass."""
    import jax
    import jax.numpy as jnp

    from opd_jax import models

    config = models.load_config(case.model)
    width, heads, kv = config.hidden_size, config.num_heads, config.num_kv_heads
    size, inner = config.head_dim, config.intermediate_size
    shapes = [
        (width, heads * size), (width, kv * size), (width, kv * size), (heads * size, width),
        (width, inner), (width, inner), (inner, width),
    ]  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(case.seed), 7 * config.num_layers + 3))

    def weight(shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    layers = [[weight(shape) for shape in shapes] for _ in range(config.num_layers)]
    head_VD = weight((config.vocab_size, width))
    x_BTD = jax.random.normal(next(keys), (case.batch, case.prompt, width))

    def split(y: jax.Array, count: int) -> jax.Array:
        return y.reshape(case.batch, case.prompt, count, -1, size)

    def forward(x_BTD: jax.Array, layers: Any, head_VD: jax.Array) -> jax.Array:
        for q, k, v, o, gate, up, down in layers:
            query = split(x_BTD @ q, kv)
            keys, values = split(x_BTD @ k, kv)[..., 0, :], split(x_BTD @ v, kv)[..., 0, :]
            scores = jnp.einsum("btkgh,bskh->bkgts", query, keys)
            mixed = jnp.einsum("bkgts,bskh->btkgh", scores, values)
            x_BTD = mixed.reshape(case.batch, case.prompt, -1) @ o
            x_BTD = (x_BTD @ gate + x_BTD @ up) @ down
        return jnp.einsum("btd,vd->btv", x_BTD, head_VD)

    if case.what == "products_forward":
        run = jax.jit(forward)
        return lambda: jax.block_until_ready(run(x_BTD, layers, head_VD)), {}
    gradient = jax.random.normal(next(keys), (case.batch, case.prompt, config.vocab_size))

    @jax.jit
    def both(layers: Any, head_VD: jax.Array, x_BTD: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(partial(forward, x_BTD), layers, head_VD)[1](gradient)

    return lambda: jax.block_until_ready(both(layers, head_VD, x_BTD, gradient)), {}


if __name__ == "__main__":
    main()
