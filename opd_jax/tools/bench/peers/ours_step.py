"""A whole on-policy distillation step of this library: rollout, scoring, loss, update.

python opd_jax/tools/bench/peers/ours_step.py --model=FOLDER --batch=8 --prompt=64 --new=64 --loss=full

The loss is the reverse KL over the whole vocabulary (full, as TRL's), or the surrogate of the sampled
tokens (sampled, this library's default). Either way all statistics of training are scored.
"""

import itertools
import time
from functools import partial

from timing import SHARPER, measure, prompts, read_case, report


def main() -> None:
    """Time steps as opd_jax.train makes them, without its files."""
    case = read_case("opd_jax step", teacher="", learning_rate=1e-6, loss="full")
    import jax
    import jax.numpy as jnp

    from opd_jax import config as fields
    from opd_jax import losses, models, scoring
    from opd_jax.models import decoder
    from opd_jax.rollout import generate
    from opd_jax.training import batch, objective, update
    from opd_jax.types import Frozen

    given = fields.default().unlock()
    optim = given.optim
    optim.learning_rate = case.learning_rate
    config, params = models.load(case.model, dtype=jnp.float32)
    teacher_config, teacher = models.load(case.teacher or case.model, dtype=jnp.float32)
    teacher["norm"]["scale"] *= SHARPER
    terms = {
        "full": objective.default_terms(
            pg_weight=0.0, divergence_weight=1.0, direction="reverse", support="full"
        ),
        "sampled": objective.default_terms(pg_weight=1.0),
    }[case.loss]
    tx = update.make_optimizer(optim, 1000)
    loss = objective.make_rollout_loss(
        terms, config,
        vocabulary=config.vocab_size, token_chunk=optim.token_chunk, remat=optim.remat,
    )  # fmt: skip
    accumulate = update.make_accumulate(
        loss, None, microbatch_tokens=optim.microbatch_tokens, dtype=jnp.float32
    )
    apply = update.make_update(tx, accumulate)
    frozen = Frozen(teacher=decoder.head_alone(teacher) if terms.over_vocabulary else None)
    states = [update.init_state(params, tx)]
    del params
    given_prompts = prompts(case)
    count = itertools.count()
    stages: dict[str, list[float]] = {"rollout": [], "score": [], "update": []}
    values: list[float] = []

    def step() -> None:
        state = states.pop()
        start = time.perf_counter()
        rollout = generate(
            state.params, config, given_prompts,
            key=jax.random.key(next(count)), max_response_tokens=case.new,
        )  # fmt: skip
        assert (rollout.response_length_B == case.new).all()
        generated = time.perf_counter()
        scores = scoring.score(
            state.params, config, teacher, teacher_config, rollout.tokens_BT, rollout.length_B,
            vocabulary=config.vocab_size, top_k=given.scoring.overlap_top_k,
            token_chunk=given.scoring.token_chunk, microbatch_tokens=optim.microbatch_tokens,
            support=terms.scored_support, keep_hidden=terms.over_vocabulary,
        )  # fmt: skip
        scored = time.perf_counter()
        mask_BT = rollout.response_mask_BT
        advantage_BT = batch.advantages(rollout, scores, mask_BT, terms, reward_B=None, group=1)
        made = batch.rollout_rows(
            rollout, scores, mask_BT, advantage_BT, terms,
            weigh=partial(losses.token_weights, aggregation="sequence", length=case.new),
        )  # fmt: skip
        state, metrics = apply(state, frozen, made, None, terms.weights)
        states.append(jax.block_until_ready(state))
        values.append(float(metrics["loss/total"]))
        for name, seconds in (
            ("rollout", generated - start),
            ("score", scored - generated),
            ("update", time.perf_counter() - scored),
        ):
            stages[name].append(seconds)

    report(
        case,
        measure(step, case),
        tokens=case.batch * case.new,
        losses=values,
        stages={name: sorted(x[case.warmups :])[case.repeats // 2] for name, x in stages.items()},
        versions={"jax": jax.__version__},
    )


if __name__ == "__main__":
    main()
