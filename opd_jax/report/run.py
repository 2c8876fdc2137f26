"""launch/report.py: workdirs in, a page, files of figures, or a summary out."""

import importlib.util
import pathlib
from collections.abc import Sequence

from opd_jax import workdir
from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.report.read import read_all
from opd_jax.report.summary import summary
from opd_jax.workdir import atomic


def run(
    folders: Sequence[str],
    *,
    out: str | None,
    figures: str | None = None,
    text: bool = False,
    samples: int = 8,
    tokenizer: str = "",
) -> None:
    """Write what is asked for, and say where; without `out` and `figures` print the summary.

    Raises WorkdirError (no run, or a place that cannot be written) and ConfigError (matplotlib is
    missing).
    """
    page_file = None if out is None else _place(out)
    drawn = page_file is not None or figures is not None
    if drawn and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "figures need matplotlib, which is not installed; pip install -c tests/constraints.txt "
            "-e '.[report]', or leave out --out and --figures for the summary"
        )
    runs = read_all(folders)
    if text or not drawn:
        print(summary(runs), flush=True)
    if not drawn:
        return
    from opd_jax.report import drawing, page
    from opd_jax.report.figures import figures as all_figures
    from opd_jax.report.figures import label

    made = all_figures(runs)
    if page_file is not None:
        whole = page.page(runs, made, samples=samples, tokenizer=tokenizer)
        _write(page_file, whole)
        print(f"written to {page_file} ({page_file.stat().st_size / 1e6:.1f} MB)", flush=True)
    if figures is not None:
        names = [label(i, one) for i, one in enumerate(runs)]
        files = drawing.export(made, names, pathlib.Path(figures))
        print(f"{len(files)} files of figures in {figures}", flush=True)


def _place(out: str) -> pathlib.Path:
    """Where the page goes. Raises WorkdirError where it cannot be written, before anything is read."""
    path = pathlib.Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise WorkdirError(f"out={out!r}, wanted a name that ends in .html; give --out={out}.html")
    if path.is_dir() or workdir.obstacle(path.parent):
        raise WorkdirError(
            f"out={out!r} cannot be written (a folder, or in a place that is read-only or no folder); "
            "give another one with --out"
        )
    return path


def _write(path: pathlib.Path, text: str) -> None:
    with atomic.reported(f"out={str(path)!r}", "give another one with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text)
