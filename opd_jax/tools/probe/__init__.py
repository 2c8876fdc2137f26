"""Examine a student and a teacher before or between runs: `launch/probe.py NAME`."""

from opd_jax.tools.probe.run import NAMES, config_of_run, run

__all__ = ["NAMES", "config_of_run", "run"]
