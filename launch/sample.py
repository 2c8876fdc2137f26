"""Cold start: python launch/sample.py --config=CONFIG[:RECIPE] --out=FILE.jsonl."""

import sys

from absl import flags

from opd_jax import cli
from opd_jax.config.trees import SAMPLING

cli.define_config("configs/opd.py", tree=SAMPLING)
flags.DEFINE_string(
    "out",
    None,
    "file to write, .jsonl; its report FILE.report.json is in the same folder",
    required=True,
)


def main() -> None:
    """Write solutions of the config's teacher to its problems, as data for configs/sft.py."""
    from opd_jax.tools.cold_start import run as sample

    sample.run(cli.FLAGS.config, cli.FLAGS.out, command=sys.argv)


if __name__ == "__main__":
    cli.main(main, tree=SAMPLING)
