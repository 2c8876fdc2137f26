"""Profile: python launch/profile.py --config=FILE.py[:RECIPE] --workdir=DIR [--steps=2] [--hlo].

Trains a few steps, traces the last ones, prints where their time went. The trace (DIR/profile) opens in
xprof (`xprof DIR/profile`) and, its trace.json.gz, in https://ui.perfetto.dev. docs/profiling.md.
"""

import os
import pathlib
import shutil
import sys

from absl import flags

from opd_jax import cli

cli.define_config("configs/stable_opd.py")
flags.DEFINE_string("workdir", None, "folder of the run, new", required=True)
flags.DEFINE_integer("steps", 2, "how many are traced", lower_bound=1)
flags.DEFINE_bool("hlo", False, "keep the compiled programs' texts, in DIR/profile/hlo")


def main() -> None:
    """Run, trace, print; profile/summary.json has the figures."""
    folder = pathlib.Path(cli.FLAGS.workdir) / "profile"
    # Compiled anew, each text written: they say which named scope an operation came from.
    hlo = folder.absolute() / "hlo"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={hlo}".strip()
    import jax  # its backend starts later, with these flags

    from opd_jax.tools.profile import run as profile
    from opd_jax.workdir import atomic

    jax.config.update("jax_enable_compilation_cache", False)
    found = profile.run(
        cli.FLAGS.config, cli.FLAGS.workdir, steps=cli.FLAGS.steps, command=sys.argv
    )
    if not cli.FLAGS.hlo:
        shutil.rmtree(hlo, ignore_errors=True)
    atomic.write_json(folder / "summary.json", profile.to_json(found), indent=2)
    print(f"\n{profile.report(found)}\n\nwritten to {folder}", flush=True)


if __name__ == "__main__":
    cli.main(main)
