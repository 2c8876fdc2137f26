"""One HTML file that works offline: figures as SVG, tables, rollouts, the numbers as CSV links."""

import base64
import hashlib
import importlib.resources
import time
from collections.abc import Sequence

from opd_jax.report import drawing, tables
from opd_jax.report.curves import POINTS
from opd_jax.report.figures import Figure, label, letter, logged
from opd_jax.report.read import Run
from opd_jax.report.samples import HEAD, Sample, as_json, rollouts
from opd_jax.report.text import escape

# Thresholds of |advantage|, in nats, between the shades of tokens.
SHADES = (0.05, 0.3, 1.0, 3.0)
_OUTCOMES = {
    "eos": "ended by itself",
    "budget": "ran out of budget",
    "repetition": "stopped on repetition",
}
_GLYPHS = {"alarm": "▼", "rollback": "◀", "stop": "■", "recovered": "●", "masking": "▲"}


def page(
    runs: Sequence[Run], figures: Sequence[Figure], *, samples: int, tokenizer: str = ""
) -> str:
    """Return the complete page. `samples` rollouts of each run; `tokenizer`: see samples.rollouts."""
    style, script = _asset("style.css"), _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        ("happened", "What happened", _verdicts(runs)),
        ("figures", "Figures", _figures(runs, figures)),
        ("answers", "Evaluations", _answers(runs)),
        ("guard", "What the guard did", _guard(runs)),
        ("cost", "Time and memory", _cost(runs)),
        ("samples", "Rollouts", _samples(runs, samples, tokenizer)),
        ("files", "Numbers and files", _files(runs)),
    ]
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{n}"><h2>{t}</h2>{text}</section>' for n, t, text in sections)
    title = ", ".join(run.name for run in runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – opd_jax report</title>\n<style>{style}</style></head>\n<body>\n"
        f'<header><h1>{_plural(len(runs), "run")} of on-policy distillation</h1><p class="quiet">Written '
        f"{time.strftime('%Y-%m-%d %H:%M')} by launch/report.py from the files of the workdirs alone.</p>"
        f"{tables.runs_table(runs)}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f'<div id="tip" role="status" hidden></div>\n<script>{script}</script>\n</body></html>\n'
    )


def _verdicts(runs: Sequence[Run]) -> str:
    items = "".join(
        f"<li>{_tag(i, run)}: {escape(run.verdict.text)}</li>" for i, run in enumerate(runs)
    )
    return (
        f'<ul class="plain">{items}</ul><p class="quiet">Judged by the rule of the collapse guard on '
        "the run's own log, whatever guard.action was (docs/guard.md): truncation has risen for sure "
        "over the run's own past, and repetition agrees.</p>"
    )


def _figures(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    if not logged(runs):
        return '<p class="missing">No run has a curve to draw.</p>'
    legend = _legend(runs)
    return "".join(_figure(figure, legend) for figure in figures)


def _figure(figure: Figure, legend: str) -> str:
    if not figure.panels:
        text = f'<p class="missing">{_said(figure.missing)}</p>'
        return f"<article><h3>{escape(figure.title)}</h3>{text}</article>"
    panels = []
    for i, panel in enumerate(figure.panels):
        drawn = drawing.svg(panel, f"{figure.name}-{i}")
        curves = ", ".join(line.label for line in panel.lines)
        name = escape(f"{panel.title}, {panel.unit}, over steps; curves {curves}")
        panels.append(f'<div class="panel">{drawn.replace("NAME", name, 1)}</div>')
    missing = f'<p class="missing">{_said(figure.missing)}</p>' if figure.missing else ""
    return (
        f'<article id="figure-{figure.name}"><h3>{escape(figure.title)}</h3>'
        f"<p>{escape(figure.text)}</p>{legend}"
        f'<div class="panels">{"".join(panels)}</div>{missing}<p class="quiet">{_thinned(figure)}'
        f"{tables.figure_csv(figure)}</p></article>"
    )


def _thinned(figure: Figure) -> str:
    longest = max(len(line.curve.step_N) for panel in figure.panels for line in panel.lines)
    if longest > POINTS:
        return (
            f"Long curves are thinned to {POINTS} points, each the mean of up to "
            f"{-(-longest // POINTS)} logged steps; the band is from the least to the greatest of them. "
        )
    return "The faint line is each step, the strong one a moving mean. " if longest > 120 else ""


def _legend(runs: Sequence[Run]) -> str:
    """Return the legend: which run is which, and the meaning of the guard's marks, where there are any."""
    items = []
    for i, run in logged(runs):
        colour = drawing.COLOURS[i % len(drawing.COLOURS)]
        dashes = drawing.DASHES[i % len(drawing.DASHES)]
        pattern = "" if dashes == "-" else " ".join(str(2 * x) for x in dashes[1])
        items.append(
            f'<span><svg class="key" viewBox="0 0 36 8" aria-hidden="true"><path d="M0 4H36" '
            f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{pattern}"/></svg> '
            f"{_tag(i, run)}</span>"
        )
    kinds = dict.fromkeys(event.kind for run in runs for event in run.events)
    items += [f"<span>{_GLYPHS[kind]} guard: {kind}</span>" for kind in kinds if kind in _GLYPHS]
    if any(run.verdict.onset is not None for run in runs):
        items.append("<span>┊ onset of the transition</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def _answers(runs: Sequence[Run]) -> str:
    out, without = [], []
    for i, run in enumerate(runs):
        html = tables.answers_table(i, run) + tables.beside_papers(i, run)
        out.append(html)
        if not html:
            without.append(letter(i))
    if without:
        out.append(
            f'<p class="missing">No evaluation in the files of {escape(", ".join(without))}.</p>'
        )
    if not any("beside the papers" in one for one in out):
        out.append(
            '<p class="missing">None of these evaluations is one of the papers\': they have other '
            "models and other problems, so no figure stands beside theirs. launch/evaluate.py on the "
            "papers' benchmarks, with a backbone of theirs, sets its figures beside them.</p>"
        )
    return (
        "".join(out)
        + "<details><summary>The averages that the papers report, for orientation</summary>"
        f"{tables.papers_table()}</details>"
    )


def _guard(runs: Sequence[Run]) -> str:
    table = tables.guard_table(runs)
    text = "Nothing: no guard/* key in the logs (it was off, or saw nothing)."
    return table or f'<p class="missing">{text}</p>'


def _cost(runs: Sequence[Run]) -> str:
    table = tables.cost_table(runs)
    return table or '<p class="missing">No run logged times.</p>'


def _samples(runs: Sequence[Run], count: int, tokenizer: str) -> str:
    out = [_shades()]
    for i, run in enumerate(runs):
        samples, notes = rollouts(run, count, tokenizer) if count else ([], [])
        out.append(f"<h3>{_tag(i, run)}</h3>")
        out += [f'<p class="missing">{escape(note[:1].upper() + note[1:])}.</p>' for note in notes]
        out.append(f'<div class="samples">{"".join(map(_sample, samples))}</div>')
    return "".join(out)


def _shades() -> str:
    """Return the legend of the colours and underlines of tokens."""
    far = [f"-{SHADES[-1]:g}", *(f"-{x:g}" for x in SHADES[-2::-1])]
    keys = [f'<i class="n{4 - k}">{x} or less</i>' for k, x in enumerate(far)]
    keys += ["<i>about 0</i>"] + [
        f'<i class="p{k + 1}">{x:g} or more</i>' for k, x in enumerate(SHADES)
    ]
    return (
        "<p>Tokens by their advantage in nats, teacher less student (or what the run trained on): "
        f"{' '.join(keys)}. Blue with a solid line: the update makes it more likely; orange with a "
        "dotted line: less likely; the wider the line, the more. "
        '<i class="r">A line above</i>: repetitive by the rule of the run. '
        '<i class="u">Italic</i>: not scored. Point at a token (or tap it) for the two log-probs. '
        "▫ begins a character that a later token ends.</p>"
    )


def _sample(sample: Sample) -> str:
    facts = [
        f"step {sample.step}",
        *([f"problem {sample.id}, sample {sample.number}"] if sample.id else []),
        _OUTCOMES.get(sample.outcome, sample.outcome),
        _plural(sample.length, "token"),
    ]
    if sample.correct is not None:
        facts.append("right" if sample.correct else "wrong")
    known = [token.advantage for token in sample.tokens if token.advantage is not None]
    if known:
        facts.append(
            f"mean advantage {sum(known) / len(known):.3f}"
            + (" of those shown" if sample.skipped else "")
        )
    repeated = sum(token.repeated for token in sample.tokens)
    if repeated:
        facts.append(f"{repeated / len(sample.tokens):.0%} repetitive")
    cut = HEAD if sample.skipped else len(sample.tokens)
    shown = [
        _token(t.text, t.advantage, t.repeated, t.student_logprob is None) for t in sample.tokens
    ]
    if sample.skipped:
        shown.insert(cut, f"<b> … {sample.skipped:,} tokens left out … </b>")
    return (
        f'<article class="sample"><h4>{escape(", ".join(facts))}</h4><details><summary>prompt</summary>'
        f'<pre dir="ltr">{escape(sample.prompt)}</pre></details><pre class="tokens" dir="ltr" tabindex="0">'
        f'{"".join(shown)}</pre><script type="application/json">{as_json(sample)}</script></article>'
    )


def _token(text: str, advantage: float | None, repeated: bool, unscored: bool) -> str:
    level = sum(abs(advantage) >= shade for shade in SHADES) if advantage is not None else 0
    sign = "n" if advantage is not None and advantage < 0 else "p"
    kinds = [f"{sign}{level}"] * bool(level) + ["r"] * repeated + ["u"] * unscored
    marked = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<i{marked}>{escape(text) or '▫'}</i>"


def _files(runs: Sequence[Run]) -> str:
    out = []
    for i, run in enumerate(runs):
        lines = _plural(run.lines, "line")
        out.append(
            f"<h3>{_tag(i, run)}</h3>"
            f"<p><code>{escape(run.folder)}</code>, {lines} of metrics.jsonl</p>"
        )
        command = run.info.get("command")
        if isinstance(command, list):
            out.append(f"<pre>python {escape(' '.join(map(str, command)))}</pre>")
        if numbers := tables.metrics_csv(i, run):
            out.append(f'<p class="file">{numbers}</p>')
        if run.notes:
            out.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in run.notes)}</ul>")
    return "".join(out)


def _tag(i: int, run: Run) -> str:
    return f"<strong>{letter(i)}</strong> {escape(label(i, run)[len(letter(i)) :].strip())}"


def _said(sentences: Sequence[str]) -> str:
    return escape(" ".join(sentences))


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _asset(name: str) -> str:
    return (importlib.resources.files("opd_jax.report") / name).read_text(encoding="utf-8")
