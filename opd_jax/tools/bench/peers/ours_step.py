"""A complete on-policy distillation step of this library: rollout, scoring, loss, update.

python opd_jax/tools/bench/peers/ours_step.py --model=FOLDER --batch=8 --prompt=64 --new=64 --loss=full

The loss is the reverse KL over the full vocabulary (`full`, as in TRL), or the surrogate on sampled tokens
(`sampled`, this library's default). Both compute all statistics of training.
"""

import itertools
import time

from timing import SHARPER, measure, prompts, read_case, report


def main() -> None:
    """Time steps of opd_jax.train without its files."""
    case = read_case("opd_jax step", teacher="", learning_rate=1e-6, loss="full")
    import jax
    import jax.numpy as jnp

    from opd_jax import data, models
    from opd_jax.config import default
    from opd_jax.models import decoder
    from opd_jax.training import batch
    from opd_jax.training.advantages import advantages
    from opd_jax.training.step_functions import make_step_functions
    from opd_jax.training.step_spec import StepSpec
    from opd_jax.training.terms import default_terms
    from opd_jax.types import Frozen

    config = default().unlock()
    config.optim.learning_rate = case.learning_rate
    config.rollout.update({"max_prompt_tokens": case.prompt, "max_response_tokens": case.new})
    student, params = models.load(case.model, dtype=jnp.float32)
    teacher_config, teacher = models.load(case.teacher or case.model, dtype=jnp.float32)
    teacher["norm"]["scale"] *= SHARPER
    terms = {
        "full": default_terms(
            pg_weight=0.0, divergence_weight=1.0, direction="reverse", support="full"
        ),
        "sampled": default_terms(pg_weight=1.0),
    }[case.loss]
    functions = make_step_functions(
        StepSpec(
            config=config,
            terms=terms,
            student=student,
            teacher=teacher_config,
            reference=None,
            alignment=data.alone(student.vocab_size, ()),
            dtype=jnp.dtype(jnp.float32),
        )
    )
    frozen = Frozen(teacher=decoder.head_alone(teacher) if terms.over_vocabulary else None)
    states = [functions.initial_state(params)]
    del params
    prompt_ids = prompts(case)
    count = itertools.count()
    stages: dict[str, list[float]] = {"rollout": [], "score": [], "update": []}
    values: list[float] = []

    def step() -> None:
        state = states.pop()
        start = time.perf_counter()
        weights = functions.compute_weights(state.params)
        rollout = functions.generate(weights, prompt_ids, jax.random.key(next(count)))
        assert (rollout.response_length_B == case.new).all()
        generated = time.perf_counter()
        scores = functions.score(weights, teacher, rollout)
        del weights
        scored = time.perf_counter()
        mask_BT = rollout.response_mask_BT
        advantage_BT = advantages(rollout, scores, mask_BT, terms)
        rows = batch.rollout_rows(
            rollout, scores, mask_BT, advantage_BT, terms, weigh=functions.weigh
        )
        state, metrics = functions.update(state, frozen, rows, None, terms.weights)
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
