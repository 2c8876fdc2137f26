"""launch/report.py: turn workdirs into a page, files of figures, or a summary."""

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
    """Write the requested outputs and print where; without `out` and `figures` print the summary.

    Raises WorkdirError (no run, or a path that cannot be written) and ConfigError (matplotlib is
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

    figure_list = all_figures(runs)
    if page_file is not None:
        html = page.page(runs, figure_list, samples=samples, tokenizer=tokenizer)
        _write(page_file, html)
        print(f"written to {page_file} ({page_file.stat().st_size / 1e6:.1f} MB)", flush=True)
    if figures is not None:
        names = [label(i, one) for i, one in enumerate(runs)]
        files = drawing.export(figure_list, names, pathlib.Path(figures))
        print(f"{len(files)} files of figures in {figures}", flush=True)


def _place(out: str) -> pathlib.Path:
    """Return the path of the page. Raises WorkdirError, before anything is read, if it cannot be written."""
    path = pathlib.Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise WorkdirError(f"out={out!r}, wanted a name that ends in .html; give --out={out}.html")
    if path.is_dir() or workdir.obstacle(path.parent):
        raise WorkdirError(
            f"out={out!r} cannot be written (it is a folder, or its folder is read-only or a file); "
            "set --out to another file"
        )
    return path


def _write(path: pathlib.Path, text: str) -> None:
    with atomic.reported(f"out={str(path)!r}", "give another one with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text)
