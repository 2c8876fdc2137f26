"""Write the table of docs/measurements/methods.md from the runs of `launch/compare.py --published`.

    python -m tests.support.method_table [RUNS]

The figures of all finished runs in the folder RUNS are added to docs/measurements/methods.json, seed by seed,
and the table is written from that file. So a machine may do one seed, and another machine the next one.

Every method is compared with plain OPD seed by seed: both runs begin with the same student, the same prompts
and the same held-out problems, on the same machine. Beside the mean difference stands its standard deviation
over the seeds.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from configs import methods
from opd_jax.tools import sweep
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "measurements" / "methods.md"
FIGURES = PAGE.with_suffix(".json")
BEGIN, END = "<!-- begin table -->\n", "<!-- end table -->\n"
MOST_SEEDS = 16

Figures = dict[str, dict[str, dict[str, Any]]]  # seed: method: figure: value


def figures(run: pathlib.Path) -> dict[str, Any]:
    """Return accuracy and TruncRate after the run, reverse KL over its last ten steps, and its origin."""
    if not (run / "config.json").exists():
        return {}
    steps = json.loads((run / "config.json").read_text())["steps"]
    summaries = sweep.evaluations(run, steps)
    if not summaries:
        return {}
    last, record = summaries[steps], json.loads((run / "run.json").read_text())
    found = {"after": 100 * last["accuracy"], "truncated": 100 * last["truncation_rate"]}
    kl = [row["score/reverse_kl"] for row in sweep.metrics(run) if "score/reverse_kl" in row]
    if kl:
        found["kl"] = 1000 * float(np.mean(kl[-10:]))
    numbers = {name: round(value, 2) for name, value in found.items()}
    return numbers | {"steps": steps, "commit": record["commit"], "jax": record["packages"]["jax"]}


def collect(known: Figures, out: pathlib.Path) -> Figures:
    """Return the figures that are known, and those of the runs in a folder."""
    merged = {seed: dict(runs) for seed, runs in known.items()}
    for seed in map(str, range(MOST_SEEDS)):
        for name in methods.METHODS:
            if found := figures(sweep.run_folder(out, name, int(seed))):
                merged.setdefault(seed, {})[name] = found
    return merged


def paired(runs: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]], key: str) -> str:
    """Return mean and standard deviation of the differences to OPD over the seeds that both have."""
    pairs = [
        run[key] - base[seed][key]
        for seed, run in runs.items()
        if key in run and key in base.get(seed, {})
    ]
    if not pairs:
        return "-"
    spread = f" ± {np.std(pairs, ddof=1):.1f}" if len(pairs) > 1 else ""
    return f"{np.mean(pairs):+.1f}{spread}"


def table(known: Figures) -> str:
    """Return the Markdown table of all methods."""
    heads = ("method", "seeds", "accuracy after, %", "less OPD's", "reverse KL x 1000", "less OPD's",
             "TruncRate, %")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    by_method = {
        name: {seed: runs[name] for seed, runs in known.items() if name in runs}
        for name in methods.METHODS
    }
    for name, runs in by_method.items():
        if not runs:
            lines.append(f"| `{name}` | not run | - | - | - | - | - |")
            continue
        values = {
            key: sweep.spread([run[key] for run in runs.values() if key in run], ".1f")
            for key in ("after", "kl", "truncated")
        }
        base = by_method["opd"]
        cells = [f"`{name}`", str(len(runs)), values["after"], paired(runs, base, "after"),
                 values["kl"], paired(runs, base, "kl"), values["truncated"]]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Add the figures of a folder to the file, and replace what stands between the two marks of the page."""
    known: Figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for folder in sys.argv[1:]:
        known = collect(known, pathlib.Path(folder))
    FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = table(known)
    PAGE.write_text(before + BEGIN + made + END + after, encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
