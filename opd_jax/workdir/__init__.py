"""The workdir of a run: files, console output, experiment trackers, and graceful shutdown."""

from opd_jax.workdir.folder import (
    check,
    create,
    date_of,
    differences,
    obstacle,
    provenance,
    read_config,
    without_secrets,
)
from opd_jax.workdir.jsonl import Lines, NoLines

__all__ = [
    "Lines",
    "NoLines",
    "check",
    "create",
    "date_of",
    "differences",
    "obstacle",
    "provenance",
    "read_config",
    "without_secrets",
]
