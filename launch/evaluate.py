"""Evaluate: python launch/evaluate.py --config=configs/evaluate.py[:PROTOCOL] --model=HF_DIR_OR_WORKDIR."""

import pathlib
import sys
import time

from absl import flags

from opd_jax import cli
from opd_jax.config.trees import EVALUATION

cli.define_config("configs/evaluate.py", tree=EVALUATION)
flags.DEFINE_string(
    "model", None, "Hugging Face folder, hub name, or the workdir of a run", required=True
)
flags.DEFINE_integer("step", None, "step of the checkpoint in that workdir; default: the newest")
flags.DEFINE_string(
    "workdir",
    None,
    "folder of the evaluation to start or resume; default: runs/evaluate-MODEL-TIME",
)


def main() -> None:
    """Sample and grade answers to the benchmarks, and print the table with the papers' rows."""
    from opd_jax.evaluation import run as runner

    model = cli.FLAGS.model
    default = f"runs/evaluate-{pathlib.PurePath(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = cli.FLAGS.workdir or default
    runner.run(cli.FLAGS.config, model, folder, step=cli.FLAGS.step, command=sys.argv)


if __name__ == "__main__":
    cli.main(main, tree=EVALUATION)
