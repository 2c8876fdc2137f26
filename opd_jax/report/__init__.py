"""Views of a workdir: a page with figures, tables and rollouts; a summary; a live view (docs/report.md)."""
