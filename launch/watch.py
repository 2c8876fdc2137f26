"""Watch: python launch/watch.py DIR [DIR...] [--every=5] [--once]; show running workdirs on the terminal."""

from absl import flags

from opd_jax import cli

flags.DEFINE_float("every", 5.0, "seconds between two updates", lower_bound=0.2)
flags.DEFINE_bool("once", False, "print the summary once and exit")


def main(*folders: str) -> None:
    """Print the summary repeatedly until Ctrl-C."""
    from opd_jax.report import watch

    watch.watch(folders, every=cli.FLAGS.every, once=cli.FLAGS.once)


if __name__ == "__main__":
    cli.main(main, folders=True)
