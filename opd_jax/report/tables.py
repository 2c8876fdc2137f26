"""The tables of the page: runs, evaluations next to the papers', the guard, memory, downloads."""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from opd_jax.evaluation import table as results
from opd_jax.evaluation.benchmarks import BENCHMARKS
from opd_jax.report.curves import thinned
from opd_jax.report.figures import Figure, letter
from opd_jax.report.read import Run
from opd_jax.report.text import clean, escape

CELLS = 100_000  # largest number of values of one run in the page's CSV
_SIDE_BY_SIDE = 3  # up to this many runs each has a column instead of a line
_COLUMNS = (
    ("accuracy", "accuracy", "share"), ("matched", "match", "share"),
    ("truncation_rate", "TruncRate", "share"), ("repetition_rate", "RepRate", "share"),
    ("length_mean", "mean length", "number"), ("unparsed", "unparsed", "share"),
    ("timeouts", "timeouts", "share"),
)  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Return a table of clean cells; the first `text` columns are words and the others numbers."""
    body = "".join(f"<tr>{_cells(row, 'td', text)}</tr>" for row in rows)
    first = _cells(head, "th", text)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def runs_table(runs: Sequence[Run]) -> str:
    """Return what each run is: models, the method's numbers, where and when it ran."""
    head = ["run", "folder", "student", "teacher", "weights of the loss", "learning rate", "steps",
            "commit", "began", "on"]  # fmt: skip
    rows = []
    for i, run in enumerate(runs):
        steps = _field(run, "steps")
        rows.append([
            letter(i), run.name, _model(run, "student"), _model(run, "teacher"), _weights(run),
            _field(run, "optim.learning_rate"), f"{run.last} of {steps}" if steps else str(run.last),
            _text(run.info.get("commit")), _text(run.info.get("started"))[:16].replace("T", " "),
            _devices(run),
        ])  # fmt: skip
    if len(rows) <= _SIDE_BY_SIDE:  # narrow screens have room for few columns
        lines = [head, *rows]
        head, *rows = ([row[k] for row in lines] for k in range(len(head)))
    return table(head, rows, text=len(head))


def answers_table(i: int, run: Run) -> str:
    """Return the evaluations of one run: before, after, and the teacher; "" without any."""
    steps = [step for step in run.answers if step.isdigit()]
    others = [who for who in run.answers if not who.isdigit()]
    shown = [*dict.fromkeys([*steps[:1], *steps[-1:]]), *others]
    benchmarks = sorted({name for step in shown for name in run.answers[step]})
    out = []
    for name in benchmarks:
        evaluations = {step: run.answers[step][name] for step in shown if name in run.answers[step]}
        columns = [
            column for column in _COLUMNS if any(column[0] in one for one in evaluations.values())
        ]
        rows = []
        for step, one in evaluations.items():
            who = f"after (step {step})" if step.isdigit() else step
            who = "before (step 0)" if step == "0" else who
            rows.append([who, *(_figure(one, key, kind) for key, _, kind in columns)])
        title = BENCHMARKS[name].title if name in BENCHMARKS else name
        out.append(
            f"<h3>{letter(i)}: {escape(title)}</h3>" + table(["", *(c[1] for c in columns)], rows)
        )
    return "".join(out)


def beside_papers(i: int, run: Run) -> str:
    """Return a table of the run's figures and the papers' rows of the same backbone; "" where none fits.

    For a workdir of launch/evaluate.py it shows the table of results.json; for a training run its last
    evaluation, where it has a benchmark and a backbone of the papers.
    """
    rows: Any = (run.results or {}).get("table")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        rows = _own_comparison(run)
    if not rows:
        return ""
    columns = [c for c in ("avg", *BENCHMARKS) if any(c in row for row in rows)]
    columns += [c for c in rows[0] if c not in (*columns, "method", "source")]
    titles = [
        ("Avg" if c == "avg" else BENCHMARKS[c].title if c in BENCHMARKS else c) for c in columns
    ]
    body = [
        [
            _text(row.get("method")),
            *(_percent(row.get(c)) for c in columns),
            _text(row.get("source")),
        ]
        for row in rows
    ]
    note = (
        ""
        if len(rows) > 1
        else "<p>The papers have no row of this backbone on these benchmarks.</p>"
    )
    return f"<h3>{letter(i)}: beside the papers, %</h3>{table(['', *titles, 'source'], body)}{note}"


def papers_table() -> str:
    """Return the averages that the papers report, with their sources."""
    averages = [row for row in results.baselines() if row["benchmark"] == "avg"]
    rows = [[row["backbone"], row["method"], row["teacher"], f"{row['value']:.1f}", row["source"]]
            for row in averages]  # fmt: skip
    return table(["backbone", "method", "teacher", "Avg, %", "source"], rows, text=3)


def guard_table(runs: Sequence[Run]) -> str:
    """Return all actions of the guard; "" where there were none."""
    rows = [[letter(i), str(event.step), event.kind, event.text]
            for i, run in enumerate(runs) for event in run.events]  # fmt: skip
    return table(["run", "step", "kind", "what"], rows, text=4) if rows else ""


def cost_table(runs: Sequence[Run]) -> str:
    """Return median seconds of each stage, its share of a step, and the planned and measured memory."""
    rows = []
    for i, run in enumerate(runs):
        step_s = _median(run, "time/step_s")
        stages = sorted(k for k in run.curves if k.startswith("time/") and k != "time/step_s")
        planned = run.plan.get("stages")
        planned = planned if isinstance(planned, dict) else {}
        for key in stages:
            name = key[5:].removesuffix("_s")
            seconds = _median(run, key)
            speed = _median(run, f"speed/{name}_tokens_per_s")
            rows.append([
                letter(i), name, _format(seconds, ".3f"),
                _format(None if not step_s or seconds is None else seconds / step_s, ".1%"),
                _format(speed, ",.0f"), _gib(planned.get(name)), "",
            ])  # fmt: skip
        if step_s is not None:
            peak = run.curves.get("memory/peak_gib")
            most = (
                None
                if peak is None or not len(peak.finite().value_N)
                else peak.finite().value_N.max()
            )
            widest = [size for size in map(_bytes, planned.values()) if size is not None]
            rows.append([letter(i), "whole step", f"{step_s:.3f}", "", "",
                         f"{max(widest) / 2**30:.2f}" if widest else "-", _format(most, ".2f")])  # fmt: skip
    if not rows:
        return ""
    head = ["run", "stage", "median s", "share", "tokens/s", "planned GiB", "peak GiB, measured"]
    return table(head, rows, text=2)


def figure_csv(figure: Figure) -> str:
    """Return the points that a figure draws, as a link to a CSV file."""
    rows: list[list[Any]] = [["panel", "curve", "step", "value", "steps_in_mean"]]
    for panel in figure.panels:
        for line in panel.lines:
            drawn = thinned(line.curve)
            rows += [[panel.title, line.label, _number(step), _number(value), drawn.per]
                     for step, value in zip(drawn.step_N, drawn.value_N, strict=True)]  # fmt: skip
    return link(f"{figure.name}.csv", rows, "numbers (CSV)")


def metrics_csv(i: int, run: Run) -> str:
    """Return metrics.jsonl as a link to a CSV file, with every k-th step where it is long."""
    if not run.curves:
        return ""
    steps = np.unique(np.concatenate([curve.step_N for curve in run.curves.values()]))
    every = -(-len(steps) * len(run.curves) // CELLS)
    kept = steps[::every]
    keys = sorted(run.curves)
    columns = []
    for key in keys:
        curve = run.curves[key]
        place = np.searchsorted(curve.step_N, kept).clip(max=len(curve.step_N) - 1)
        columns.append(np.where(curve.step_N[place] == kept, curve.value_N[place], np.nan))
    rows: list[list[Any]] = [["step", *keys]]
    rows += [
        [int(step), *map(_number, values)]
        for step, values in zip(kept, np.array(columns).T, strict=True)
    ]
    extent = (
        "every step" if every == 1 else f"every {every}th logged step; all are in metrics.jsonl"
    )
    name = f"{letter(i)}-metrics.csv"
    return f"{link(name, rows, name)}: {len(keys)} keys, {extent}"


def link(name: str, rows: Iterable[Sequence[Any]], text: str) -> str:
    """Return a link that saves the rows as a CSV file, whose content is inside the link."""
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerows(
        [clean(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
    )
    data = base64.b64encode(target.getvalue().encode()).decode()
    return (
        f'<a class="file" download="{escape(name)}" href="data:text/csv;charset=utf-8;base64,{data}">'
        f"{escape(text)}</a>"
    )


def _cells(row: Sequence[str], tag: str, text: int) -> str:
    kinds = ["" if i < text or row[i] in ("", None) else ' class="n"' for i in range(len(row))]
    return "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kinds, row, strict=True))


def _own_comparison(run: Run) -> list[dict[str, Any]]:
    steps = [step for step in run.answers if step.isdigit()]
    evaluations = run.answers[steps[-1]] if steps else {}
    evaluations = {
        n: one
        for n, one in evaluations.items()
        if n in BENCHMARKS and {"accuracy", "stderr"} <= one.keys()
    }
    backbone = results.backbone_of(run.config["student"]["path"])
    table = results.comparison(run.name, evaluations, backbone) if evaluations and backbone else []
    return table if len(table) > 1 else []


def _field(run: Run, name: str) -> str:
    value: Any = run.config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else _text(value)


def _model(run: Run, role: str) -> str:
    path = _field(run, f"{role}.path").rstrip("/")
    evaluated = (run.results or {}).get("model")
    if role == "student" and not path and isinstance(evaluated, dict):
        path = _text(evaluated.get("path")).rstrip("/")
    return "/".join(path.split("/")[-2:]) or "-"


def _weights(run: Run) -> str:
    names = ("pg_weight", "divergence_weight", "lambda_gold", "golden_divergence", "beta_kl")
    weights = {name: _field(run, f"loss.{name}") for name in names}
    return (
        ", ".join(f"{name} {x}" for name, x in weights.items() if x not in ("", "0", "0.0")) or "-"
    )


def _devices(run: Run) -> str:
    devices = run.info.get("devices")
    kinds = [_text(x) for x in devices] if isinstance(devices, list) else []
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "-"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _figure(one: dict[str, float], key: str, kind: str) -> str:
    if key not in one:
        return "-"
    if kind == "number":
        return f"{one[key]:,.1f}"
    error = f" ± {one['stderr']:.1%}" if key == "accuracy" and "stderr" in one else ""
    return f"{one[key]:.1%}{error}"


def _percent(cell: Any) -> str:
    value = cell.get("value") if isinstance(cell, dict) else None
    if type(value) not in (int, float):
        return "-"
    error = cell.get("stderr")
    return f"{value:.1f}" + (f" ± {error:.1f}" if type(error) in (int, float) else "")


def _median(run: Run, key: str) -> float | None:
    known = run.curves[key].finite().value_N if key in run.curves else np.zeros(0)
    return float(np.median(known)) if len(known) else None


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _bytes(held: Any) -> float | None:
    if not isinstance(held, dict):
        return None
    sizes = [x for x in held.values() if type(x) in (int, float)]
    return float(sum(sizes))


def _gib(held: Any) -> str:
    size = _bytes(held)
    return "-" if size is None else f"{size / 2**30:.2f}"


def _number(value: float) -> str:
    return "" if not np.isfinite(value) else f"{float(value):.6g}" if value % 1 else str(int(value))
