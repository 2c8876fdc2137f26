"""Probe: python launch/probe.py NAME --config=CONFIG[:RECIPE] [--workdir=DIR [--step=N]] [--out=FILE.json].

NAME is `pair` (is this teacher worth training with? --teachers=DIR,DIR2 compares several) or
`continuation` (does the teacher still help after the student's own prefixes, compared with alone?).
See docs/probes.md.
"""

import sys
from typing import Any

from absl import flags

from opd_jax import cli
from opd_jax.config.trees import PROBING

NAMES = ("pair", "continuation")

cli.define_config("configs/opd.py", tree=PROBING)
flags.DEFINE_string(
    "workdir", None,
    "workdir of a run whose checkpoint is the student; the run's own config applies, or with --config only "
    "the student is that of the run; default: student.path of the config",
)  # fmt: skip
flags.DEFINE_integer("step", None, "step of the checkpoint; default: the newest", lower_bound=0)
flags.DEFINE_list(
    "teachers", [], "comma-separated model folders that `pair` compares, instead of teacher.path"
)
flags.DEFINE_string("out", None, "JSON file to write: figures, verdict, every answer")


def main(name: str) -> None:
    """Run the probe NAME, and print its figures and verdict."""
    from opd_jax.tools import probe

    options = cli.FLAGS
    flag: Any = options["config"]
    config = options.config
    if options.workdir and not flag.present:
        config = probe.config_of_run(options.workdir, flag.override_values)
    probe.run(
        name,
        config,
        folder=options.workdir,
        step=options.step,
        teachers=options.teachers,
        out=options.out,
        command=sys.argv,
    )


if __name__ == "__main__":
    cli.main(main, tree=PROBING, names=NAMES)
