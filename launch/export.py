"""Export: python launch/export.py --workdir=DIR --out=HF_DIR [--step=N] [--dtype=bfloat16]."""

from absl import flags

from opd_jax import cli

flags.DEFINE_string("workdir", None, "folder of the run", required=True)
flags.DEFINE_string("out", None, "folder to write, new or empty", required=True)
flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", lower_bound=0)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the weights")


def main() -> None:
    """Write the student of a run as a folder that transformers loads."""
    from opd_jax.checkpoint import export

    given = cli.FLAGS
    step = export.export(given.workdir, given.out, step=given.step, dtype=given.dtype)
    print(f"step {step} of {given.workdir} -> {given.out}", flush=True)


if __name__ == "__main__":
    cli.main(main)
