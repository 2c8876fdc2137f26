"""Train many objectives on `tiny`, several seeds each, and print their table.

python launch/compare.py --out=runs/objectives [--seeds=3] [--steps=60] [--only=NAME,NAME]

Runs one after the other, each as `launch/train.py` in a folder of its own; what is done already is not
done again, so a killed comparison goes on. The table is Markdown: accuracy before and after, reverse KL
at the first step and over the last ten, TruncRate, seconds.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import flags

from opd_jax import cli
from opd_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
TOPK = "configs/topk_opd.py"
OBJECTIVES = {  # name: config and what is changed of `loss`
    "OPD, sampled token": ("configs/opd.py", ""),
    "OPD, clamp 5": ("configs/opd.py", "advantage_clamp=5"),
    "OPD, discount 0.5": ("configs/opd.py", "discount=0.5"),
    "OPD + KL": ("configs/opd.py", "beta_kl=0.01"),
    "OPD + mix": ("configs/opd.py", "lambda_gold=0.1"),
    "Stable-OPD": ("configs/stable_opd.py", ""),
    "full, reverse": (TOPK, "support=full form=raw"),
    "full, forward": (TOPK, "support=full form=raw direction=forward"),
    "full, JSD 0.5": (TOPK, "support=full form=raw direction=jsd"),
    "full, skewed reverse 0.1": (TOPK, "support=full form=raw direction=skewed_reverse"),
    "full, skewed forward 0.1": (TOPK, "support=full form=raw direction=skewed_forward"),
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
    "GRPO": ("configs/grpo.py", ""),
    "Dr.GRPO": ("configs/grpo.py", "group_normalise=False aggregation=constant"),
    "OPD + GRPO": ("configs/opd.py", "group_coef=0.1"),
    "SFT": ("configs/sft.py", ""),
}  # fmt: skip

flags.DEFINE_string("out", "runs/objectives", "folder of the runs")
flags.DEFINE_integer("seeds", 3, "runs of each objective", lower_bound=1)
flags.DEFINE_integer("steps", 60, "steps of each run", lower_bound=1)
flags.DEFINE_list("only", [], "objectives to run; default all")


def main() -> None:
    """Run what is missing, print the table of what is there."""
    given = flags.FLAGS
    unknown = set(given.only) - OBJECTIVES.keys()
    if unknown:
        raise ConfigError(
            f"--only={sorted(unknown)[0]!r} is not an objective; known: {'; '.join(OBJECTIVES)}"
        )
    chosen = {name: OBJECTIVES[name] for name in given.only or OBJECTIVES}
    out = pathlib.Path(given.out)
    for seed in range(given.seeds):
        for name, (config, changes) in chosen.items():
            folder = out / f"{_slug(name)}-{seed}"
            if not (folder / "eval" / str(given.steps) / "tiny.json").exists():
                print(f"{name}, seed {seed}", flush=True)
                _train(folder, config, changes, seed, given.steps)
    print(table(out, chosen, given.seeds, given.steps))


def _train(folder: pathlib.Path, config: str, changes: str, seed: int, steps: int) -> None:
    command = [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--config={ROOT / config}",
        f"--workdir={folder}", f"--config.seed={seed}", f"--config.steps={steps}",
        "--config.eval.every=0", "--config.eval.teacher=False",
        *(f"--config.loss.{change}" for change in changes.split()),
    ]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            print(f"  failed: see {log.name}", flush=True)


def table(out: pathlib.Path, chosen: dict, seeds: int, steps: int) -> str:
    """Mean and standard deviation over the seeds of each objective, as Markdown."""
    lines = [
        "| objective | seeds | accuracy before | after | reverse KL before | after | TruncRate | s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in chosen:
        runs = [out / f"{_slug(name)}-{seed}" for seed in range(seeds)]
        found = [_figures(run, steps) for run in runs]
        found = [figures for figures in found if figures]
        if found:
            cells = [_spread([f[key] for f in found if key in f], form) for key, form in COLUMNS]
            lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


COLUMNS = (
    ("before", ".1%"), ("after", ".1%"), ("kl_before", ".3f"), ("kl_after", ".3f"),
    ("truncated", ".1%"), ("seconds", ".0f"),
)  # fmt: skip


def _figures(run: pathlib.Path, steps: int) -> dict[str, float]:
    """What the table shows of one run; empty where it did not end."""
    summaries = [run / "eval" / str(step) / "tiny.json" for step in (0, steps)]
    if not all(file.exists() for file in summaries):
        return {}
    before, after = (json.loads(file.read_text()) for file in summaries)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "before": before["accuracy"],
        "after": after["accuracy"],
        "truncated": after["truncation_rate"],
        "seconds": sum(row.get("time/step_s", 0.0) for row in rows),
    }
    kl = [row["score/reverse_kl"] for row in rows if "score/reverse_kl" in row]
    return figures | ({"kl_before": kl[0], "kl_after": float(np.mean(kl[-10:]))} if kl else {})


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    return f"{mean} ± {format(float(np.std(values, ddof=1)), form)}" if len(values) > 1 else mean


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


if __name__ == "__main__":
    cli.main(main)
