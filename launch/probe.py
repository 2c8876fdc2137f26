"""Probe: python launch/probe.py NAME --config=CONFIG[:RECIPE] [--workdir=DIR [--step=N]] [--out=FILE.json].

NAME is pair (is this teacher worth training with? --teachers=DIR,DIR2 compares several) or continuation (does
the teacher still help after the student's own prefixes? also compares it with the teacher alone).
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
    "a run whose checkpoint is the student. The run's own config is used, unless --config is given: then "
    "only the student comes from the run. Default: the config's student.path",
)  # fmt: skip
flags.DEFINE_integer(
    "step", None, "step of the run's checkpoint; default the newest", lower_bound=0
)
flags.DEFINE_list(
    "teachers", [], "folders that pair compares, instead of teacher.path; separated by commas"
)
flags.DEFINE_string("out", None, "file to write, .json: figures, verdict, every answer")


def main(name: str) -> None:
    """Run the probe NAME and print its results."""
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
