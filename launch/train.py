"""Train: python launch/train.py --config=configs/stable_opd.py[:RECIPE] [--workdir=DIR]."""

import pathlib
import re
import sys
import time
from typing import Any

from absl import flags

from opd_jax import cli
from opd_jax.workdir import stop as signals

cli.define_config("configs/stable_opd.py")
cli.define_processes()
flags.DEFINE_string(
    "workdir", None, "folder of the run to start or resume; default: runs/CONFIG-RECIPE-TIME"
)
flags.DEFINE_bool(
    "accept_changes",
    False,
    "resume although the config differs from the run's; run.json records it",
)


def main(stop: signals.Stop) -> None:
    """Run the training that the config describes."""
    from opd_jax import train
    from opd_jax.sharding import multihost

    workdir = cli.FLAGS.workdir or multihost.from_first(_default_workdir)
    train.run(
        cli.FLAGS.config,
        workdir,
        command=sys.argv,
        stop=stop,
        accept_changes=cli.FLAGS.accept_changes,
    )


def _default_workdir() -> str:
    flag: Any = cli.FLAGS["config"]
    file, _, recipe = flag.config_filename.partition(":")
    name = f"{pathlib.Path(file).stem}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', recipe or 'tiny')}"
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


if __name__ == "__main__":
    cli.main(main, stops=True)
