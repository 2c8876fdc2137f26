"""Draw panels with matplotlib: as SVG for the page, and complete figures as PNG and SVG files."""

import io
import pathlib
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from opd_jax.errors import WorkdirError
from opd_jax.report.curves import Drawn, smooth, thinned
from opd_jax.report.figures import Figure, Line, Mark, Panel
from opd_jax.report.text import line

# Okabe and Ito's colours, which colour-blind readers can distinguish, together with dashes: no curve is
# identified by its colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#000000", "#56B4E9", "#A6761D")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1)),
                           (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (10, 3, 2, 3)))  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "oo")
FILLS = ("#9ecae1", "#fdd0a2", "#c7e9c0", "#dadaeb", "#f0f0f0", "#c6dbef", "#e5d8bd")
# Markers of the guard's events, at the top of a panel and in the legend.
EVENTS = {"alarm": "v", "rollback": "<", "stop": "s", "recovered": "o", "masking": "^"}
_SPARSE, _ROUGH = 40, 120  # up to this many points: draw markers; do not smooth
_STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 8.5, "svg.fonttype": "none", "hatch.linewidth": 0.6, "text.parse_math": False,
}  # fmt: skip


def svg(panel: Panel, name: str) -> str:
    """Draw one panel as an `<svg>` element; `name` makes its ids unique in a page."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        canvas = Canvas(figsize=(4.4, 3.1), layout="constrained")
        draw(canvas.add_subplot(), panel)
        target = io.StringIO()
        canvas.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    start = f'<svg role="img" aria-label="NAME" viewBox="0 0 {width} {height}" '
    text = re.sub(
        r"<svg [^>]*?>", start + 'xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1
    )
    text = re.sub(r'\bd="[^"]*"', _coarse, text)
    text = re.sub(r"\n\s*", "\n", text)
    return text.replace("font: 9px 'DejaVu Sans'", "font: 9px 'DejaVu Sans', Verdana, sans-serif")


def export(figures: list[Figure], legend: list[str], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write NAME.png and NAME.svg of every figure with panels. Raises WorkdirError: cannot be written."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            if figure.panels:
                canvas = _complete(figure, legend)
                for ending in ("png", "svg"):
                    path = folder / f"{figure.name}.{ending}"
                    with matplotlib.rc_context(_STYLE | {"svg.fonttype": "path"}):
                        canvas.savefig(path, dpi=150)
                    written.append(path)
    except OSError as error:
        raise WorkdirError(
            f"figures {str(folder)!r} cannot be written ({error.strerror or error}); "
            "give another folder with --figures"
        ) from None
    return written


def draw(axes: Any, panel: Panel) -> None:
    """Draw a panel on matplotlib's axes."""
    drawn = [thinned(line.curve) for line in panel.lines]
    if panel.form == "stacked":
        _stack(axes, panel.lines, drawn)
    else:
        for curve, one in zip(panel.lines, drawn, strict=True):
            _curve(axes, curve, one)
    for mark in panel.marks:
        _mark(axes, mark)
    axes.set_title(line(panel.title, 48))
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.unit.startswith("share"):
        _percent(axes, drawn)
    elif panel.unit.startswith("tokens") and axes.get_ylim()[1] < 1e7:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if len(panel.lines) > 1 or panel.form == "stacked" or len(panel.lines[0].label) > 1:
        columns = 2 if max(len(curve.label) for curve in panel.lines) > 14 else 3
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=columns, handlelength=3.2,
            columnspacing=1.2, labelspacing=0.3, borderaxespad=0.0,
        )  # fmt: skip


def _name(curve: Line) -> str:
    """Return the name for the legend; matplotlib omits names that begin with an underscore."""
    name = line(curve.label, 32)
    return f" {name}" if name.startswith("_") else name


def _coarse(path: re.Match[str]) -> str:
    """Round a path to hundredths of a point, which shrinks it to a third."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


def _curve(axes: Any, curve: Line, drawn: Drawn) -> None:
    colour, dashes = COLOURS[curve.look % len(COLOURS)], DASHES[curve.look % len(DASHES)]
    kept = np.isfinite(drawn.value_N)
    count = int(kept.sum())
    name = _name(curve)
    if count <= _SPARSE:
        marker = MARKERS[curve.look % len(MARKERS)]
        axes.plot(drawn.step_N[kept], drawn.value_N[kept], color=colour, linestyle=dashes, lw=1.5,
                  marker=marker, ms=3.5, label=name)  # fmt: skip
        if curve.error is not None:
            _, i, j = np.intersect1d(drawn.step_N, curve.error.step_N, return_indices=True)
            axes.errorbar(drawn.step_N[i], drawn.value_N[i], yerr=curve.error.value_N[j],
                          fmt="none", ecolor=colour, elinewidth=0.9, capsize=2)  # fmt: skip
        return
    if drawn.per > 1:
        axes.fill_between(drawn.step_N, drawn.low_N, drawn.high_N, color=colour, alpha=0.15, lw=0)
    shown_N = drawn.value_N
    if drawn.per == 1 and count > _ROUGH:
        axes.plot(drawn.step_N, drawn.value_N, color=colour, lw=0.7, alpha=0.35)
        shown_N = smooth(drawn.value_N, 2 * (count // 60) + 1)
    axes.plot(drawn.step_N, shown_N, color=colour, linestyle=dashes, lw=1.7, label=name)


def _stack(axes: Any, lines: list[Line], drawn: list[Drawn]) -> None:
    """Draw areas on top of each other; a missing value counts as 0."""
    step_N = np.unique(np.concatenate([one.step_N for one in drawn]))
    below_N = np.zeros(len(step_N))
    for curve, one in zip(lines, drawn, strict=True):
        height_N = np.zeros(len(step_N))
        height_N[np.searchsorted(step_N, one.step_N)] = np.nan_to_num(one.value_N)
        axes.fill_between(
            step_N, below_N, below_N + height_N, facecolor=FILLS[curve.look % len(FILLS)],
            hatch=HATCHES[curve.look % len(HATCHES)], edgecolor="#444444", lw=0.3, label=_name(curve),
        )  # fmt: skip
        below_N = below_N + height_N
    axes.set_ylim(0, float(np.quantile(below_N, 0.99)) * 1.15 or 1.0)


def _mark(axes: Any, mark: Mark) -> None:
    """Draw a dotted line for an onset, or a marker at the top for an event of the guard."""
    colour = "#333333" if mark.look < 0 else COLOURS[mark.look % len(COLOURS)]
    if mark.kind == "onset":
        axes.axvline(mark.step, color=colour, lw=1.0, linestyle=":")
        axes.annotate(mark.label, (mark.step, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                      xytext=(2, 0), textcoords="offset points", fontsize=7, color=colour,
                      path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
        return
    axes.plot(mark.step, 1.0, marker=EVENTS.get(mark.kind, "v"), ms=6, color=colour, clip_on=False,
              transform=axes.get_xaxis_transform(), linestyle="none", zorder=5)  # fmt: skip


def _percent(axes: Any, drawn: list[Drawn]) -> None:
    """Scale the axis for shares: from 0, and up to 100 % if they are large."""
    most = max(float(np.nanmax(one.high_N)) for one in drawn)
    top = 1.04 if most > 0.5 else max(most * 1.15, 0.02)
    axes.set_ylim(-0.02 * top, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None if most > 0.05 else 1))


def _complete(figure: Figure, legend: list[str]) -> Canvas:
    """Draw all panels of a figure, three in a row, with the legend of the letters below."""
    with matplotlib.rc_context(_STYLE):
        across = min(len(figure.panels), 3)
        down = -(-len(figure.panels) // across)
        canvas = Canvas(figsize=(4.4 * across, 3.1 * down + 0.5), layout="constrained")
        FigureCanvasAgg(canvas)
        for i, panel in enumerate(figure.panels):
            draw(canvas.add_subplot(down, across, i + 1), panel)
        canvas.suptitle(figure.title, fontsize=11, fontweight="bold")
        canvas.supxlabel("     ".join(line(text, 60) for text in legend[:8]), fontsize=8)
    return canvas
