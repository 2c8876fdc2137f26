"""The folder of a run: its files, its console, the trackers beside it, and the request to stop."""

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
