"""Generation with this library, in the setting of the peers.

python opd_jax/tools/bench/peers/ours_generate.py --model=FOLDER --batch=8 --prompt=64 --new=128
"""

from timing import measure, prompts, read_case, report


def main() -> None:
    """Time `generate`; without end tokens every row uses its full budget."""
    case = read_case("opd_jax generate")
    import itertools

    import jax
    import jax.numpy as jnp

    from opd_jax import models
    from opd_jax.rollout import generate

    config, params = models.load(case.model, dtype=jnp.float32)
    rows = prompts(case)
    count = itertools.count()

    def step() -> None:
        key = jax.random.key(next(count))
        rollout = generate(params, config, rows, key=key, max_response_tokens=case.new)
        assert (rollout.response_length_B == case.new).all(), rollout.response_length_B

    report(
        case,
        measure(step, case),
        tokens=case.batch * case.new,
        versions={"jax": jax.__version__},
    )


if __name__ == "__main__":
    main()
