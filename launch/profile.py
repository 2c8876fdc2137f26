"""Profile: python launch/profile.py --config=FILE.py[:RECIPE] --workdir=DIR [--steps=2] [--hlo].

Trains a few steps, traces the last ones, and prints where their time went. Open the trace (DIR/profile)
with `xprof DIR/profile`, or its trace.json.gz in https://ui.perfetto.dev. See docs/profiling.md.
"""

import os
import pathlib
import shutil
import sys

from absl import flags

from opd_jax import cli

cli.define_config("configs/stable_opd.py")
flags.DEFINE_string("workdir", None, "new folder for the run", required=True)
flags.DEFINE_integer("steps", 2, "number of steps to trace", lower_bound=1)
flags.DEFINE_bool("hlo", False, "keep XLA's text of the compiled programs in DIR/profile/hlo")


def main() -> None:
    """Run, trace and print; write the figures to profile/summary.json."""
    folder = pathlib.Path(cli.FLAGS.workdir) / "profile"
    # Dump the text of every program: it maps operations to named scopes. This needs a new compilation.
    hlo = folder.absolute() / "hlo"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={hlo}".strip()
    import jax  # its backend starts later and reads these flags

    from opd_jax.tools.profile import run as profile
    from opd_jax.workdir import atomic

    jax.config.update("jax_enable_compilation_cache", False)
    figures = profile.run(
        cli.FLAGS.config, cli.FLAGS.workdir, steps=cli.FLAGS.steps, command=sys.argv
    )
    if not cli.FLAGS.hlo:
        shutil.rmtree(hlo, ignore_errors=True)
    atomic.write_json(folder / "summary.json", profile.to_json(figures), indent=2)
    print(f"\n{profile.report(figures)}\n\nwritten to {folder}", flush=True)


if __name__ == "__main__":
    cli.main(main)
