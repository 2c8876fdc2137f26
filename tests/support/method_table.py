"""Write the table of docs/measurements/methods.md from the runs of `launch/compare.py --published`.

    python -m tests.support.method_table runs/methods [SEEDS] [STEPS]

Every method is compared with plain OPD seed by seed: both runs begin with the same student, the same prompts
and the same held-out problems. Beside the mean difference stands its standard deviation over the seeds.
"""

import pathlib
import sys

import numpy as np

from configs import methods
from opd_jax.tools import sweep
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "measurements" / "methods.md"
BEGIN, END = "<!-- begin table -->\n", "<!-- end table -->\n"


def figures(run: pathlib.Path, steps: int) -> dict[str, float]:
    """Return accuracy, TruncRate and length after the run, and reverse KL over its last ten steps."""
    summaries = sweep.evaluations(run, steps)
    if not summaries:
        return {}
    last = summaries[steps]
    found = {"after": 100 * last["accuracy"], "truncated": 100 * last["truncation_rate"]}
    kl = [row["score/reverse_kl"] for row in sweep.metrics(run) if "score/reverse_kl" in row]
    return found | ({"kl": 1000 * float(np.mean(kl[-10:]))} if kl else {})


def paired(runs: list[dict], base: list[dict], key: str) -> str:
    """Return mean and standard deviation of the differences to OPD over the seeds that both have."""
    pairs = [a[key] - b[key] for a, b in zip(runs, base, strict=True) if key in a and key in b]
    if not pairs:
        return "-"
    spread = f" ± {np.std(pairs, ddof=1):.1f}" if len(pairs) > 1 else ""
    return f"{np.mean(pairs):+.1f}{spread}"


def table(out: pathlib.Path, seeds: int, steps: int) -> str:
    """Return the Markdown table of all methods that have a finished run."""
    heads = ("method", "seeds", "accuracy after, %", "less OPD's", "reverse KL x 1000", "less OPD's",
             "TruncRate, %")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]

    def runs_of(name: str) -> list[dict]:
        return [figures(sweep.run_folder(out, name, seed), steps) for seed in range(seeds)]

    base = runs_of("opd")
    for name in methods.METHODS:
        runs = runs_of(name)
        done = [run for run in runs if run]
        if not done:
            lines.append(f"| `{name}` | not run | - | - | - | - | - |")
            continue
        values = {
            key: sweep.spread([run[key] for run in done if key in run], ".1f")
            for key in ("after", "kl", "truncated")
        }
        cells = [f"`{name}`", str(len(done)), values["after"], paired(runs, base, "after"),
                 values["kl"], paired(runs, base, "kl"), values["truncated"]]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace what stands between the two marks of the page."""
    out, seeds, steps = (sys.argv[1:] + ["3", "40"][len(sys.argv) - 2 :])[:3]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = table(pathlib.Path(out), int(seeds), int(steps))
    PAGE.write_text(before + BEGIN + made + END + after, encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
