"""Record rollouts for replay: python launch/record.py --config=CONFIG[:RECIPE] --out=FOLDER."""

from absl import flags

from opd_jax import cli
from opd_jax.workdir import stop as signals

cli.define_config("configs/opd.py")
flags.DEFINE_string(
    "out", None, "folder to write: a file for each step, and manifest.json", required=True
)


def main(stop: signals.Stop) -> None:
    """Sample the rollouts of `steps` steps and score them with the teacher, once."""
    from opd_jax.tools import record

    record.run(cli.FLAGS.config, cli.FLAGS.out, stop=stop)


if __name__ == "__main__":
    cli.main(main, stops=True)
