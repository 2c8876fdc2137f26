"""Report: python launch/report.py DIR [DIR...] [--out=report.html] [--figures=DIR] [--text].

What the workdirs of runs show: one page with figures, tables and rollouts, or a summary on the terminal.
"""

from absl import flags

from opd_jax import cli

flags.DEFINE_string("out", None, "file to write, .html; without it the summary alone is printed")
flags.DEFINE_string("figures", None, "folder for every figure as PNG and SVG")
flags.DEFINE_bool("text", False, "print the summary, also beside a page")
flags.DEFINE_integer("samples", 8, "rollouts shown of each run", lower_bound=0, upper_bound=200)
flags.DEFINE_string("tokenizer", None, "folder of the student's tokenizer, where it has moved")


def main(*folders: str) -> None:
    """Read the workdirs and show what they hold."""
    from opd_jax.report import run

    given = cli.FLAGS
    run.run(
        folders,
        out=given.out,
        figures=given.figures,
        text=given.text,
        samples=given.samples,
        tokenizer=given.tokenizer or "",
    )


if __name__ == "__main__":
    cli.main(main, folders=True)
