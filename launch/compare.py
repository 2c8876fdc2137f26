"""Compare many objectives on `tiny`, or all published methods, with several seeds each, in one table.

python launch/compare.py --out=runs/objectives [--seeds=3] [--steps=60] [--only=NAME --only=NAME]
python launch/compare.py --out=runs/methods --published [--seeds=3] ...     # all of configs/methods.py

Each run is a `launch/train.py` command with its own folder, one after the other. Finished runs are not
repeated, so the same command resumes a killed comparison. The table is Markdown: accuracy before and
after, reverse KL at the first step and over the last ten, TruncRate, tokens sampled by all steps, seconds.
"""

import pathlib

import numpy as np
from absl import flags

from opd_jax import cli
from opd_jax.tools import sweep

TOPK = "topk_opd"
OBJECTIVES = {  # name: config, changed fields of `loss`
    "OPD, sampled token": ("opd", ""),
    "OPD, clamp 5": ("opd", "advantage_clamp=5"),
    "OPD, discount 0.5": ("opd", "discount=0.5"),
    "OPD + KL": ("opd", "beta_kl=0.01"),
    "OPD + mix": ("opd", "lambda_gold=0.1"),
    "Stable-OPD": ("stable_opd", ""),
    "full, reverse": (TOPK, "support=full form=raw top_k=16"),
    "full, forward": (TOPK, "support=full form=raw top_k=16 direction=forward"),
    "full, JSD 0.5": (TOPK, "support=full form=raw top_k=16 direction=jsd"),
    "full, skewed reverse 0.1": (TOPK, "support=full form=raw top_k=16 direction=skewed_reverse"),
    "full, skewed forward 0.1": (TOPK, "support=full form=raw top_k=16 direction=skewed_forward"),
    "teacher top-4, renormalised": (TOPK, ""),
    "student top-4, raw": (TOPK, "support=student form=raw"),
    "student top-4, stop-gradient": (TOPK, "support=student form=stop_gradient"),
    "student top-4, tail": (TOPK, "support=student form=tail"),
    "intersection, renormalised": (TOPK, "support=intersection"),
    "union, renormalised": (TOPK, "support=union"),
    "symmetric difference, tail": (TOPK, "support=symmetric_difference form=tail"),
    "top-4 surrogate (2604.13016)": (
        TOPK, "pg_weight=1 advantage=support support=student divergence_weight=0 form=raw",
    ),
    "GRPO": ("grpo", ""),
    "Dr.GRPO": ("grpo", "group_normalise=False aggregation=constant"),
    "OPD + GRPO": ("opd", "group_coef=0.1"),
    "SFT": ("sft", ""),
}  # fmt: skip

COLUMNS = (
    ("accuracy before", "before", ".1%"), ("after", "after", ".1%"),
    ("reverse KL before", "kl_before", ".3f"), ("after", "kl_after", ".3f"),
    ("TruncRate", "truncated", ".1%"), ("tokens sampled", "tokens", ",.0f"), ("s a run", "seconds", ".0f"),
)  # fmt: skip


def main() -> None:
    """Run what is missing, and print the table of all finished runs."""
    options = flags.FLAGS
    out = pathlib.Path(options.out)
    objectives = sweep.chosen(published() if options.published else OBJECTIVES, options.only)
    failed = sweep.run_missing(
        (
            sweep.train(
                config,
                sweep.run_folder(out, name, seed),
                seed=seed,
                steps=options.steps,
                changes=["eval.every=0", "eval.teacher=False", *options.change]
                + [f"loss.{change}" for change in changes.split()],
            )
            for seed in range(options.seeds)
            for name, (config, changes) in objectives.items()
        ),
        out,
    )
    print(sweep.table(out, objectives, COLUMNS, figures, seeds=options.seeds, steps=options.steps))
    sweep.require_none(failed, out)


def published() -> dict[str, tuple[str, str]]:
    """Return the methods of configs/methods.py."""
    cli.find_configs()
    from configs import methods

    return {name: (f"methods.py:{name}", "") for name in methods.METHODS}


def figures(run: pathlib.Path, steps: int) -> sweep.Figures:
    """Return the figures of one run for the table; empty if the run is not finished."""
    summaries = sweep.evaluations(run, steps)
    if not summaries:
        return {}
    rows = sweep.metrics(run)
    figures = {
        "before": summaries[0]["accuracy"],
        "after": summaries[steps]["accuracy"],
        "truncated": summaries[steps]["truncation_rate"],
        "tokens": sum(row.get("rollout/tokens", 0.0) for row in rows),
        "seconds": sum(row.get("time/step_s", 0.0) + row.get("time/jump_s", 0.0) for row in rows),
    }
    kl = [row["score/reverse_kl"] for row in rows if "score/reverse_kl" in row]
    return figures | ({"kl_before": kl[0], "kl_after": float(np.mean(kl[-10:]))} if kl else {})


if __name__ == "__main__":
    sweep.define_flags("runs/objectives")
    flags.DEFINE_bool("published", False, "compare the methods of configs/methods.py")
    flags.DEFINE_multi_string(
        "change", [], "FIELD=VALUE that every run sets; give each set its own --out"
    )
    cli.show("published", "change")
    cli.main(main)
