"""Summarise the answers of a benchmark, and compare a model with the papers' figures in a table."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.evaluation import statistics
from opd_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from opd_jax.workdir.console import aligned

Row = dict[str, Any]
_BASELINES = pathlib.Path(__file__).with_name("baselines.json")
GRADES = ("CORRECT", "WRONG", "UNPARSED", "TIMEOUT")


def summary(rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """Return all figures of one benchmark from its answers, which are ordered by problem.

    The figures are accuracy (avg@k, or pass@1 if k is 1) with stderr over problems, bootstrap_stderr and
    the 95 % interval of the bootstrap; pass@j for j = 1, 2, 4, ... k; maj@k; the shares truncation_rate
    and repetition_rate; length_mean in tokens; the counts of the four grades.
    """
    grades = np.array([row["grade"] for row in rows]).reshape(-1, samples)
    correct_PK = grades == "CORRECT"
    classes = [statistics.answer_class(row["extracted"], row["grade"]) for row in rows]
    spread, low, high = statistics.bootstrap(correct_PK)
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        "problems": len(correct_PK),
        "samples": samples,
        "metric": f"avg@{samples}" if samples > 1 else "pass@1",
        "accuracy": statistics.avg_at_k(correct_PK),
        "stderr": statistics.stderr(correct_PK),
        "bootstrap_stderr": spread,
        "bootstrap_95": [low, high],
        "pass_at": {
            str(j): statistics.pass_at_k(correct_PK, j) for j in sorted({*powers, samples})
        },
        "maj_at_k": statistics.maj_at_k(
            [classes[i : i + samples] for i in range(0, len(classes), samples)], correct_PK
        ),
        "truncation_rate": float(np.mean([row["outcome"] == "budget" for row in rows])),
        "repetition_rate": float(np.mean([row["repetitive"] for row in rows])),
        "length_mean": float(np.mean([row["length"] for row in rows])),
        "tokens": int(sum(row["length"] for row in rows)),
        "grades": {name: int((grades == name).sum()) for name in GRADES},
    }


def baselines() -> list[Row]:
    """Return the papers' figures: method, backbone, teacher, benchmark ("avg" of six), value (%), source."""
    return json.loads(_BASELINES.read_text(encoding="utf-8"))


def backbone_of(name: str) -> str:
    """Return the papers' backbone whose name is part of a model's name, "" if there is none."""
    backbones = sorted({row["backbone"] for row in baselines()}, key=len, reverse=True)
    return next((backbone for backbone in backbones if backbone.lower() in name.lower()), "")


def comparison(model: str, summaries: dict[str, dict[str, Any]], backbone: str) -> list[Row]:
    """Return the rows of the table: first the model's, then the papers' for the same backbone.

    A row has `method`, `source`, and under each benchmark `value` (%); the model's row also has `stderr`.
    "avg" is present if all six benchmarks of 2604.08527 are.
    """
    own: Row = {"method": model, "source": "this evaluation"}
    for name, summary in summaries.items():
        own[name] = {"value": 100 * summary["accuracy"], "stderr": 100 * summary["stderr"]}
    if all(name in summaries for name in PAPER):
        error = np.sqrt(sum(own[name]["stderr"] ** 2 for name in PAPER)) / len(PAPER)
        mean = np.mean([own[name]["value"] for name in PAPER])
        own["avg"] = {"value": float(mean), "stderr": float(error)}
    table = [own]
    columns = set(own)
    for entry in baselines():
        if entry["backbone"] != backbone or entry["benchmark"] not in columns:
            continue
        method = entry["method"] + (f" ({entry['teacher']})" if entry["teacher"] else "")
        row = next(
            (r for r in table[1:] if (r["method"], r["source"]) == (method, entry["source"])), None
        )
        if row is None:
            row = {"method": method, "source": entry["source"]}
            table.append(row)
        row[entry["benchmark"]] = {"value": entry["value"]}
    return table


def as_text(table: Sequence[Row], *, markdown: bool = False) -> str:
    """Format the comparison as aligned text or as Markdown."""
    columns = [c for c in ("avg", *BENCHMARKS) if any(c in row for row in table)]
    columns += [c for c in table[0] if c not in (*columns, "method", "source")]
    titles = {"avg": "Avg"} | {name: entry.title for name, entry in BENCHMARKS.items()}
    lines = [["", *(titles.get(c, c) for c in columns), "source"]]
    lines += [[r["method"], *(_cell(r.get(c)) for c in columns), r["source"]] for r in table]
    return _format(lines, markdown=markdown)


def details(summaries: dict[str, dict[str, Any]], *, markdown: bool = False) -> str:
    """Format the further figures of each benchmark as aligned text or as Markdown."""
    head = ["", "metric", "accuracy", "bootstrap 95%", "pass@k", "maj@k", "TruncRate", "RepRate",
            "mean length", "unparsed", "timeouts", "problems"]  # fmt: skip
    lines = [head]
    for name, row in summaries.items():
        low, high = row["bootstrap_95"]
        lines.append([
            BENCHMARKS[name].title if name in BENCHMARKS else name, row["metric"],
            f"{row['accuracy']:.1%} ± {row['stderr']:.1%}", f"{low:.1%} to {high:.1%}",
            f"{row['pass_at'][str(row['samples'])]:.1%}", f"{row['maj_at_k']:.1%}",
            f"{row['truncation_rate']:.1%}", f"{row['repetition_rate']:.1%}",
            f"{row['length_mean']:.1f}", str(row["grades"]["UNPARSED"]),
            str(row["grades"]["TIMEOUT"]), str(row["problems"]),
        ])  # fmt: skip
    return _format(lines, markdown=markdown)


def _cell(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-"
    return f"{cell['value']:.1f}" + (f" ± {cell['stderr']:.1f}" if "stderr" in cell else "")


def _format(lines: list[list[str]], *, markdown: bool) -> str:
    if markdown:
        clean = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        rule = "|" + "---|" * len(lines[0])
        rows = ["| " + " | ".join(line) + " |" for line in clean]
        return "\n".join([rows[0], rule, *rows[1:]])
    left = [i for i, name in enumerate(lines[0]) if i == 0 or name == "source"]
    return "\n".join(aligned(lines, left=left))
