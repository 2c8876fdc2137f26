"""Run several methods on `tiny` with several seeds, one run after the other, and tabulate the results.

Used by launch/compare.py and launch/reproduce.py. Finished runs are not repeated, so a comparison that
was killed resumes.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from absl import flags

from opd_jax import cli
from opd_jax.errors import ConfigError, OpdError

ROOT = pathlib.Path(__file__).parents[2]
T = TypeVar("T")
Command = tuple[
    pathlib.Path, list[str]
]  # a file that exists once the command is done, and the command
Column = tuple[str, str, str]  # title, name of the figure, format
Figures = dict[str, float]


def define_flags(out: str) -> None:
    """Define the flags --out, --seeds, --steps and --only; `out` is the default of the first."""
    flags.DEFINE_string("out", out, "folder of all outputs")
    flags.DEFINE_integer("seeds", 3, "runs of each method", lower_bound=1)
    flags.DEFINE_integer("steps", 60, "steps of each run", lower_bound=1)
    flags.DEFINE_multi_string("only", [], "a method to run; may be repeated; default: all")
    cli.show("out", "seeds", "steps", "only")


def chosen(methods: Mapping[str, T], only: Sequence[str]) -> dict[str, T]:
    """Return the methods in `only`, or all. Raises ConfigError for an unknown name."""
    for name in only:
        if name not in methods:
            raise ConfigError(
                f"--only={name!r} is not a method; set --only to one of: {'; '.join(methods)}"
            )
    return {name: methods[name] for name in only or methods}


def run_folder(out: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Return the folder of a run."""
    words = "".join(c if c.isalnum() else " " for c in method.lower()).split()
    return out / f"{'-'.join(words)}-{seed}"


def train_command(
    config: str, folder: pathlib.Path, *, seed: int, steps: int, changes: Sequence[str]
) -> list[str]:
    """Return the command for launch/train.py on configs/CONFIG.py:tiny, or configs/CONFIG if it names one.

    `config` is such as "opd" or "methods.py:vopd", whose recipe is `tiny` too; `changes` are overrides such
    as "loss.beta_kl=0.1".
    """
    file = config if ":" in config else f"{config}.py:tiny"
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--config={ROOT}/configs/{file}",
        f"--workdir={folder}", f"--config.seed={seed}", f"--config.steps={steps}",
        *(f"--config.{change}" for change in changes),
    ]  # fmt: skip


def train(
    config: str, folder: pathlib.Path, *, seed: int, steps: int, changes: Sequence[str]
) -> Command:
    """Return `train_command`; it is done when the last evaluation exists."""
    done = folder / "eval" / str(steps) / "tiny.json"
    return done, train_command(config, folder, seed=seed, steps=steps, changes=changes)


def run_missing(commands: Iterable[Command], out: pathlib.Path) -> int:
    """Run the commands that are not done, one after the other, with output in OUT/log.txt.

    Returns how many commands failed.
    """
    failed = 0
    out.mkdir(parents=True, exist_ok=True)
    for done, command in commands:
        if done.exists():
            continue
        print(done.relative_to(out), flush=True)
        with (out / "log.txt").open("a") as log:
            print(*command, file=log, flush=True)
            if subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode:
                print(f"  failed: see {log.name}", flush=True)
                failed += 1
    return failed


def require_none(failed: int, out: pathlib.Path) -> None:
    """Raise OpdError where commands of `run_missing` failed."""
    if failed:
        raise OpdError(
            f"{failed} of the commands failed; see {out / 'log.txt'}, and run the same command again for "
            "the missing results"
        )


def evaluations(run: pathlib.Path, steps: int) -> dict[int, dict]:
    """Return summaries of the held-out problems by step, empty if step 0 or `steps` is missing."""
    files = {int(file.parent.name): file for file in run.glob("eval/[0-9]*/tiny.json")}
    if not {0, steps} <= files.keys():
        return {}
    return {step: json.loads(file.read_text()) for step, file in files.items()}


def metrics(run: pathlib.Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(
    out: pathlib.Path,
    methods: Iterable[str],
    columns: Sequence[Column],
    figures: Callable[[pathlib.Path, int], Figures],
    *,
    seeds: int,
    steps: int,
) -> str:
    """Return a Markdown table of mean and standard deviation over the seeds of each method.

    `figures(run, steps)` returns the figures of a run by column, empty where the run is not finished.
    """
    lines = [
        f"| method | seeds | {' | '.join(title for title, _, _ in columns)} |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for name in methods:
        runs = [figures(run_folder(out, name, seed), steps) for seed in range(seeds)]
        runs = [run for run in runs if run]
        cells = [spread([run[key] for run in runs if key in run], form) for _, key, form in columns]
        lines.append(f"| {name} | {len(runs) or 'not run'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Format values: `mean ± standard deviation`, a single value, or `-` for none."""
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    return f"{mean} ± {format(float(np.std(values, ddof=1)), form)}" if len(values) > 1 else mean
