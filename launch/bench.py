"""Benchmarks: python launch/bench.py --suite=cpu|h200|peers [--out=FILE.json] [--model=DIR] [--repeats=3].

Prints a table, and writes every figure with the environment to --out. docs/measurements/benchmarks.md
explains the figures.
"""

import pathlib
import sys

from absl import flags

from opd_jax import cli

flags.DEFINE_enum("suite", "cpu", ["cpu", "h200", "peers"], "what to measure")
flags.DEFINE_string("out", None, "JSON file to write; default runs/bench-SUITE.json")
flags.DEFINE_string(
    "model", "", "suites cpu and peers: folder of a model, instead of the embedded one"
)
flags.DEFINE_integer("repeats", 3, "repeats of each case after its first call", lower_bound=1)
flags.DEFINE_float(
    "budget_s", None, "no case starts after this many seconds; default: what the suite needs",
    lower_bound=0.0,
)  # fmt: skip
for peer in ("torch", "trl", "tunix"):  # each in its own environment
    flags.DEFINE_string(f"{peer}_python", "", f"suite peers: Python of an environment with {peer}")
flags.DEFINE_string("only", "", "run only cases whose name starts with this")
flags.DEFINE_bool(
    "resume", False, "keep what --out holds of the same machine and commit, and measure the rest"
)
flags.DEFINE_bool("dry", False, "run the same code at toy shapes, on any machine")


def main() -> None:
    """Run the suite and print its table."""
    from opd_jax.errors import BenchError
    from opd_jax.tools.bench import cpu, h200, peer_runs, report
    from opd_jax.tools.bench.run import Options, verdict

    values = cli.FLAGS
    budgets_s = {"cpu": 440.0, "h200": 440.0, "peers": peer_runs.BUDGET_S}
    options = Options(
        out=pathlib.Path(values.out or f"runs/bench-{values.suite}.json"),
        model=values.model,
        repeats=values.repeats,
        budget_s=budgets_s[values.suite] if values.budget_s is None else values.budget_s,
        dry=values.dry,
        only=values.only,
        resume=values.resume,
    )
    pythons = peer_runs.Pythons(
        sys.executable,
        values.torch_python or sys.executable,
        values.trl_python,
        values.tunix_python,
    )
    suites = {
        "cpu": cpu.run,
        "h200": h200.run,
        "peers": lambda options: peer_runs.run(options, pythons),
    }
    rows = suites[values.suite](options)
    print(report.table(rows))
    print(f"written to {options.out}", flush=True)
    if fault := verdict(rows):
        raise BenchError(fault)


if __name__ == "__main__":
    cli.main(main)
