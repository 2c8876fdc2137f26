"""The suite `cpu`: the embedded model, or another one, in float32 on all cores."""

import functools
import pathlib

import jax.numpy as jnp

import opd_jax
from opd_jax.tools.bench import cases, ceilings, workloads
from opd_jax.tools.bench.cases import Bench
from opd_jax.tools.bench.floors import Floors
from opd_jax.tools.bench.measure import Row
from opd_jax.tools.bench.run import Case, Options, run_cases, toy_if

TINY = pathlib.Path(opd_jax.__file__).parent / "tiny" / "student"


def run(options: Options) -> list[Row]:
    """Measure generation at two batch sizes, refilled slots, scoring, an update and a complete step."""
    dry = options.dry
    subject = workloads.loaded_subject(options.model or str(TINY), jnp.float32)
    config = subject.config
    bench = Bench(
        repeats=options.repeats,
        most_s=20.0,
        microbatch_tokens=2048,
        token_chunk=toy_if(dry, 256, 32),
        floors=Floors(),
    )
    prompt, new = toy_if(dry, 64, 8), toy_if(dry, 128, 8)
    rows, width = toy_if(dry, 8, 2), toy_if(dry, 256, 16)

    def machine() -> list[Row]:
        products = [
            *ceilings.products_of(config, toy_if(dry, 2048, 16)),
            *ceilings.products_of(config, 8),
        ]
        bench.ceilings, measured = ceilings.measure(
            products, dtype=jnp.float32, copy_gib=0.001 if dry else 0.25, repeats=options.repeats
        )
        return measured

    listed = [Case("ceilings", "", machine)]
    for batch in (toy_if(dry, 8, 2), toy_if(dry, 32, 3)):
        fn = functools.partial(
            cases.generation, bench, subject, batch=batch, prompt=prompt, new=new
        )
        listed.append(Case(f"generate, batch {batch}", f"{prompt}+{new}", fn))
    listed += [
        Case(
            "slots", "",
            lambda: cases.refill(
                bench, config, jnp.float32, slots=toy_if(dry, 8, 2), prompt=prompt, budget=new
            ),
        ),
        Case(
            "score", "",
            lambda: cases.scoring(bench, "score", subject, subject, rows=rows, width=width),
        ),
        Case(
            "update", "",
            lambda: cases.updating(
                bench, "update", config, jnp.float32, rows=rows, width=width, remat="none"
            ),
        ),
        Case(
            "step", "",
            lambda: cases.whole_step(
                bench, "OPD step", config, subject,
                batch=rows, prompt=prompt, new=new // 2, remat="none",
            ),
        ),
    ]  # fmt: skip
    return run_cases("cpu", listed, options)
