"""Watch: python launch/watch.py DIR [DIR...] [--every=5] [--once]: running workdirs, on the terminal."""

from absl import flags

from opd_jax import cli

flags.DEFINE_float("every", 5.0, "seconds between two looks", lower_bound=0.2)
flags.DEFINE_bool("once", False, "look once, and end")


def main(*folders: str) -> None:
    """Show the summary again and again until Ctrl-C."""
    from opd_jax.report import watch

    watch.watch(folders, every=cli.FLAGS.every, once=cli.FLAGS.once)


if __name__ == "__main__":
    cli.main(main, folders=True)
