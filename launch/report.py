"""Report: python launch/report.py DIR [DIR...] [--out=report.html] [--figures=DIR] [--text].

Shows the workdirs of runs as one page with figures, tables and rollouts, or as a summary on the terminal.
"""

from absl import flags

from opd_jax import cli

flags.DEFINE_string("out", None, "HTML file to write; without it only the summary is printed")
flags.DEFINE_string("figures", None, "folder in which to write every figure as PNG and SVG")
flags.DEFINE_bool("text", False, "print the summary also if --out or --figures is set")
flags.DEFINE_integer("samples", 8, "rollouts to show per run", lower_bound=0, upper_bound=200)
flags.DEFINE_string("tokenizer", None, "folder of the student's tokenizer, if it has moved")


def main(*folders: str) -> None:
    """Read the workdirs, and write the page or print the summary."""
    from opd_jax.report import run

    options = cli.FLAGS
    run.run(
        folders,
        out=options.out,
        figures=options.figures,
        text=options.text,
        samples=options.samples,
        tokenizer=options.tokenizer or "",
    )


if __name__ == "__main__":
    cli.main(main, folders=True)
