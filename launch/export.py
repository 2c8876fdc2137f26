"""Export: python launch/export.py --workdir=DIR --out=HF_DIR [--step=N] [--dtype=bfloat16] [--adapters]."""

from absl import flags

from opd_jax import cli

flags.DEFINE_string("workdir", None, "workdir of the run", required=True)
flags.DEFINE_string("out", None, "folder to write; it must be new or empty", required=True)
flags.DEFINE_integer("step", None, "step of the checkpoint; default: the newest", lower_bound=0)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "dtype of the weights")

flags.DEFINE_bool(
    "adapters", False, "write the adapters alone, in PEFT's format, not the merged model"
)


def main() -> None:
    """Write the student of a run as a folder that transformers can load."""
    from opd_jax.checkpoint import export

    options = cli.FLAGS
    if options.adapters:
        step = export.export_adapters(options.workdir, options.out, step=options.step)
    else:
        step = export.export(options.workdir, options.out, step=options.step, dtype=options.dtype)
    print(f"step {step} of {options.workdir} -> {options.out}", flush=True)


if __name__ == "__main__":
    cli.main(main)
