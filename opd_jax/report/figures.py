"""The figures and the curves in each. A metric that no run has is omitted, with a sentence."""

import dataclasses
import re
from collections.abc import Sequence

from opd_jax.report.curves import Curve, between, standardised
from opd_jax.report.read import Run

SEPARATE = 6  # largest number of runs with panels of their own
STABLE, AGREE = "2604.08527", "2604.13016"
_PAIR = re.compile(r"^(opd|divergence|sft|reference_kl)_(?!kl$)(.+)$")  # two terms of a cosine


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of a panel. `look` selects colour, dashes and marker; `error` is drawn around it."""

    label: str
    look: int
    curve: Curve
    error: Curve | None = None


@dataclasses.dataclass(frozen=True)
class Mark:
    """A mark at a step: `kind` is onset, or that of a guard's event."""

    step: int
    kind: str
    look: int
    label: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes. `unit` belongs to the y axis; x is always the step.

    `form` is lines or stacked (areas on top of each other).
    """

    title: str
    unit: str
    lines: list[Line]
    marks: list[Mark] = dataclasses.field(default_factory=list)
    form: str = "lines"


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels under one title; `missing` are sentences about what is omitted."""

    name: str
    title: str
    text: str
    panels: list[Panel]
    missing: list[str] = dataclasses.field(default_factory=list)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Return every figure of the report, in order; one without panels has only its sentences."""
    return [
        _rollouts(runs), _held_out(runs), _signals(runs), _repeated(runs), _together(runs),
        _agreement(runs), _positions(runs), _gradients(runs), _losses(runs), _time(runs),
    ]  # fmt: skip


def letter(i: int) -> str:
    """Return the letter of a run in figures: A, B, ... Z, A2, B2, ..."""
    return chr(65 + i % 26) + (str(i // 26 + 1) if i >= 26 else "")


def label(i: int, run: Run) -> str:
    """Return the name of a run where there is room."""
    return f"{letter(i)}  {run.name}"


def _rollouts(runs: Sequence[Run]) -> Figure:
    return _overlaid(
        runs, "rollouts", "Rollouts: truncated, repetitive, right, how long",
        f"What the student writes in training ({STABLE}, Figs. 1, 2, 5, 6). TruncRate is the share that ran "
        "out of budget, RepRate the share whose tail repeats itself. An abrupt transition takes both up "
        "within some 30 steps.",
        [("rollout/truncation_rate", "TruncRate of rollouts", "share of rollouts"),
         ("rollout/repetition_rate", "RepRate of rollouts", "share of rollouts"),
         ("rollout/accuracy", "Accuracy of rollouts", "share of rollouts"),
         ("rollout/length_mean", "Mean response length", "tokens"),
         ("rollout/stopped_rate", "Stopped on repetition", "share of rollouts")],
        marked=True, silent=("rollout/stopped_rate",),
    )  # fmt: skip


def _held_out(runs: Sequence[Run]) -> Figure:
    panels = []
    names = sorted({name for run in runs for name in run.benchmarks})
    for name in names:
        for key, title, unit in (
            ("accuracy", "Accuracy", "share of answers"),
            ("matched", "Answers that match", "share of answers"),
            ("truncation_rate", "TruncRate", "share of answers"),
            ("repetition_rate", "RepRate", "share of answers"),
            ("length_mean", "Mean length", "tokens"),
        ):
            error = f"eval/{name}/stderr" if key == "accuracy" else ""
            lines = _lines(runs, f"eval/{name}/{key}", error)
            if lines:
                panels.append(Panel(f"{title}, {name}", unit, lines, _marks(runs)))
    missing = (
        [] if panels else ["No run measured held-out answers on the way (eval.data, eval.every)."]
    )
    return Figure(
        "held-out", "Held-out answers: right, truncated, repetitive, how long",
        f"The same shares on problems that are not trained on ({STABLE}, Figs. 2, 5, 6, there MATH-500). "
        "Points are evaluations; the bars on accuracy are one standard error.",
        panels, missing,
    )  # fmt: skip


def _signals(runs: Sequence[Run]) -> Figure:
    return _overlaid(
        runs, "signals", "What the teacher's signal does: log-probs, advantage, length",
        f"Means over response tokens ({STABLE}, Fig. 3). At the onset of a collapse both log-probs become "
        "less negative, the teacher's more than the student's, so the advantage rises together with the "
        "length: a rising advantage with a rising length is no success.",
        [("score/student_logprob_mean", "Student's log-prob of its tokens", "nats a token"),
         ("score/teacher_logprob_mean", "Teacher's log-prob of these", "nats a token"),
         ("score/advantage_mean", "Advantage, teacher less student", "nats a token"),
         ("rollout/length_mean", "Mean response length", "tokens")],
        marked=True,
    )  # fmt: skip


def _repeated(runs: Sequence[Run]) -> Figure:
    panels, missing = [], []
    share = _lines(runs, "score/repeated_token_fraction")
    if share:
        panels.append(Panel("Share of repetitive tokens", "share of tokens", share, _marks(runs)))
    for i, run in _separate(runs):
        lines = _named(run, [("score/repeated_token_advantage", "repetitive"),
                             ("score/regular_token_advantage", "regular")])  # fmt: skip
        if lines:
            title = f"{letter(i)}: advantage of repetitive and regular tokens"
            panels.append(Panel(title, "nats a token", lines, _own_marks(run)))
            if "score/repeated_token_advantage" not in run.curves:
                missing.append(
                    f"{label(i, run)} has no repetitive tokens, so no advantage of these."
                )
    if not panels:
        missing.append("No run has score/repeated_token_fraction or the two advantages.")
    return Figure(
        "repetitive", "Repetitive against regular tokens: advantage and share",
        f"({STABLE}, Fig. 4.) Where repetitive tokens have the larger advantage and are no longer rare, the "
        "update makes more of them. Which tokens count as repetitive: metrics.repeated_tokens of the run.",
        panels, missing + _too_many(runs),
    )  # fmt: skip


def _together(runs: Sequence[Run]) -> Figure:
    panels, missing = [], []
    for i, run in _separate(runs):
        curves = [("score/advantage_mean", "advantage"), ("score/teacher_logprob_mean", "teacher log-prob"),
                  ("rollout/truncation_rate", "TruncRate"), ("rollout/repetition_rate", "RepRate"),
                  ("rollout/length_mean", "length")]  # fmt: skip
        curves = [
            (f"eval/{name}/accuracy", "held-out accuracy") for name in run.benchmarks[:1]
        ] + curves
        lines = [
            dataclasses.replace(line, curve=standardised(line.curve))
            for line in _named(run, curves)
            if len(line.curve.finite().step_N) > 1
        ]
        if len(lines) > 1:
            title = f"{letter(i)}: standardised, onset marked" if run.verdict.onset else ""
            title = title or f"{letter(i)}: standardised, no onset"
            panels.append(Panel(title, "standard deviations", lines, _own_marks(run)))
        else:
            missing.append(f"{label(i, run)} has fewer than two of these curves.")
    return Figure(
        "together", "Do the shifts come together?",
        f"Each curve less its mean, in its own standard deviations ({STABLE}, Fig. 7): what moves at one "
        "step stands out whatever its unit.",
        panels, missing + _too_many(runs),
    )  # fmt: skip


def _agreement(runs: Sequence[Run]) -> Figure:
    return _overlaid(
        runs, "agreement", "How student and teacher agree: overlap, entropies, masses",
        f"({AGREE}, Eqs. 6-10, Figs. 6, 12, 14, 19; hedging words: 2605.11182.) In runs that work "
        f"the overlap of "
        "the top-k sets rises, the overlap advantage goes to 0 and the entropy gap narrows.",
        [("score/overlap_ratio", "Overlap of the top-k sets", "share of ids"),
         ("score/overlap_advantage", "Overlap advantage", "nats"),
         ("score/entropy_gap", "Entropy gap", "nats"),
         ("score/student_entropy", "Student's entropy", "nats"),
         ("score/teacher_entropy", "Teacher's entropy", "nats"),
         ("score/reverse_kl", "KL(student || teacher), exact", "nats a token"),
         ("score/student_overlap_mass", "Student's mass on shared ids", "probability"),
         ("score/teacher_overlap_mass", "Teacher's mass on shared ids", "probability"),
         ("score/extreme_probability_difference", "p - q at the largest advantage", "probability"),
         ("score/reward_auroc", "Does the reward tell right from wrong?", "AUROC"),
         ("score/hedging_rate", "Hedging words", "share of words")],
        silent=("score/reward_auroc",),
    )  # fmt: skip


def _positions(runs: Sequence[Run]) -> Figure:
    panels, missing = [], []
    for i, run in _separate(runs):
        any_lines = False
        for name, title, unit in (
            ("overlap_ratio", "overlap", "share of ids"), ("entropy_gap", "entropy gap", "nats"),
            ("student_entropy", "student's entropy", "nats"), ("advantage_mean", "advantage", "nats a token"),
        ):  # fmt: skip
            parts = between(run.curves, name)
            if len(parts) > 1:
                lines = [Line(part, j, curve) for j, (part, curve) in enumerate(parts.items())]
                panels.append(
                    Panel(f"{letter(i)}: {title} by position", unit, lines, _own_marks(run))
                )
                any_lines = True
        if not any_lines:
            missing.append(
                f"{label(i, run)} logged no positions: all metrics.positions are beyond its budget, "
                "or nothing was scored."
            )
    return Figure(
        "positions", "By position in the response",
        f"Means over the tokens between two positions ({AGREE}, Figs. 11, 13). Too long a budget "
        f"fails from the "
        "back: entropies rise in the last positions first.",
        panels, missing + _too_many(runs),
    )  # fmt: skip


def _gradients(runs: Sequence[Run]) -> Figure:
    panels, missing = [], []
    for key, title, unit in (("optim/grad_norm", "Gradient norm before clipping", "norm"),
                             ("optim/learning_rate", "Learning rate", "rate")):  # fmt: skip
        if lines := _lines(runs, key):
            panels.append(Panel(title, unit, lines, _marks(runs)))
    for i, run in _separate(runs):
        norms = _starting(run, "optim/grad_norm_")
        angles = _starting(run, "optim/grad_cosine_")
        if norms:
            panels.append(
                Panel(f"{letter(i)}: gradient norm of each term", "norm", norms, _own_marks(run))
            )
        if angles:
            title = f"{letter(i)}: angle between two terms' gradients"
            panels.append(Panel(title, "cosine", angles, _own_marks(run)))
        if not norms:
            missing.append(f"{label(i, run)} logged no gradients of single terms: its loss has one term, "
                           "or log.gradients is 0 or above its steps.")  # fmt: skip
    return Figure(
        "gradients", "Gradients: whole, and of each term",
        "Norms are of the weighted terms' own gradients, once in log.gradients steps; a cosine below 0 means "
        "that two terms pull in opposite directions.",
        panels, missing + _too_many(runs),
    )  # fmt: skip


def _losses(runs: Sequence[Run]) -> Figure:
    keys = ("total", "opd", "divergence", "sft", "golden_divergence", "reference_kl")
    return _overlaid(
        runs, "losses", "The loss and its terms",
        "Unweighted terms. The surrogate's value says little by itself: its gradient is what counts.",
        [(f"loss/{key}", f"loss/{key}", "nats a token") for key in keys],
        silent=tuple(f"loss/{key}" for key in keys[1:]),
    )  # fmt: skip


def _time(runs: Sequence[Run]) -> Figure:
    panels, missing = [], []
    for i, run in _separate(runs):
        stages = [key for key in run.curves if key.startswith("time/") and key != "time/step_s"]
        lines = _named(run, [(key, key[5:].removesuffix("_s")) for key in stages])
        if lines:
            title = f"{letter(i)}: seconds of a step by stage"
            panels.append(Panel(title, "seconds", lines, [], "stacked"))
        else:
            missing.append(f"{label(i, run)} logged no times.")
    shared = _overlaid(
        runs, "", "", "",
        [(f"speed/{name}_tokens_per_s", f"Speed of {stage}", "tokens a second")
         for name, stage in (("rollout", "sampling"), ("score", "scoring"), ("update", "the update"))]
        + [("memory/peak_gib", "Peak memory so far", "GiB")],
    )  # fmt: skip
    return Figure(
        "time", "Time and memory of a step",
        "The stages lie on top of each other; the axis ends above the 99th percentile, since the "
        "first step also "
        "compiles. Memory is of the first device, on a CPU of the process.",
        panels + shared.panels, missing + shared.missing + _too_many(runs),
    )  # fmt: skip


def _overlaid(
    runs: Sequence[Run],
    name: str,
    title: str,
    text: str,
    metrics: Sequence[tuple[str, str, str]],
    *,
    marked: bool = False,
    silent: Sequence[str] = (),
) -> Figure:
    """Make a panel for each (key, title, unit) that some run has; a sentence for each that one lacks.

    Missing `silent` keys get no sentence: many methods do not have them.
    """
    panels, missing = [], []
    for key, heading, unit in metrics:
        lines = _lines(runs, key)
        if lines:
            panels.append(Panel(heading, unit, lines, _marks(runs) if marked else []))
        if key not in silent:
            lacking = [letter(i) for i, run in logged(runs) if not _has(run, key)]
            if lacking:
                who = f"not in {', '.join(lacking)}" if lines else "in no run"
                missing.append(f"{heading}: {who} ({key})")
    notes = [f"Left out: {'; '.join(missing)}."] if missing else []
    return Figure(name, title, text, panels, notes)


def _has(run: Run, key: str) -> bool:
    return key in run.curves and bool(len(run.curves[key].finite().step_N))


def _lines(runs: Sequence[Run], key: str, error: str = "") -> list[Line]:
    return [
        Line(letter(i), i, run.curves[key], run.curves.get(error))
        for i, run in enumerate(runs)
        if _has(run, key)
    ]


def _named(run: Run, metrics: Sequence[tuple[str, str]]) -> list[Line]:
    """Return several keys of one run as lines of one panel."""
    return [
        Line(title, j, run.curves[key]) for j, (key, title) in enumerate(metrics) if _has(run, key)
    ]


def _starting(run: Run, prefix: str) -> list[Line]:
    titles = {key: key.removeprefix(prefix) for key in run.curves if key.startswith(prefix)}
    return _named(run, [(key, _PAIR.sub(r"\1, \2", name)) for key, name in titles.items()])


def _marks(runs: Sequence[Run]) -> list[Mark]:
    return [mark for i, run in enumerate(runs) for mark in _own_marks(run, i, f"{letter(i)} ")]


def _own_marks(run: Run, look: int = -1, prefix: str = "") -> list[Mark]:
    """Return the onset and the guard's events; `look` -1 is black."""
    events = [
        Mark(event.step, event.kind, look, "") for event in run.events if event.kind != "terms"
    ]
    onset = run.verdict.onset
    return events + (
        [] if onset is None else [Mark(onset, "onset", look, f"{prefix}onset {onset}")]
    )


def logged(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """Return the runs that have curves, with their indices among all."""
    return [(i, run) for i, run in enumerate(runs) if run.curves]


def _separate(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    return logged(runs)[:SEPARATE]


def _too_many(runs: Sequence[Run]) -> list[str]:
    if len(logged(runs)) <= SEPARATE:
        return []
    return [f"Panels of single runs are drawn for the first {SEPARATE} of {len(runs)} runs."]
