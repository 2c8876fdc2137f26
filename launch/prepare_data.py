"""Prepare data: python launch/prepare_data.py --config=configs/prepare_data.py[:RECIPE] --out=DIR."""

from absl import flags

from opd_jax import cli
from opd_jax.errors import ConfigError
from opd_jax.tools.prepare_data.config import TREE

cli.define_config("configs/prepare_data.py", tree=TREE)
flags.DEFINE_string(
    "out", None, "folder of the result; a run that was killed resumes in its folder"
)


def main() -> None:
    """Filter, decontaminate and split the rows; print the counts."""
    from opd_jax.tools.prepare_data import run as prepare

    if not cli.FLAGS.out:
        raise ConfigError("--out is missing; give a folder for the result: --out=DIR")
    report = prepare.prepare(cli.FLAGS.config, cli.FLAGS.out)
    print(prepare.table(report))


if __name__ == "__main__":
    cli.main(main, tree=TREE)
