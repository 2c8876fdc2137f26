"""`continuation`: the teacher continues prefixes of the student's rollouts, at several depths.

2604.13016, section 6.1 (Fig. 11b): the accuracy that the teacher adds to student prefixes of growing length.
2605.11182: the teacher alone against the teacher on student prefixes (62.1 % and 46.0 %).
One computation covers both: at depth 0 each model answers alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax import models
from opd_jax.errors import ConfigError, DataError
from opd_jax.grading.grader import Grader
from opd_jax.tools.probe import verdict
from opd_jax.tools.probe.means import mean, paired
from opd_jax.tools.probe.verdict import DepthFigures
from opd_jax.tools.probe.workload import Plan, load_teacher
from opd_jax.tools.probe.writing import (
    Answer,
    Part,
    read,
    student_writer,
    summary,
    teacher_writer,
    write,
)
from opd_jax.workdir import console


def depths(section: Sequence[int], budget: int) -> list[int]:
    """Return the depths to cut at in increasing order: `probe.depths`, or 1/8, 1/4 and 1/2 of the budget.

    Raises ConfigError for a depth that leaves no token of the budget.
    """
    chosen = sorted(section) or sorted({max(budget // part, 1) for part in (8, 4, 2)})
    if chosen[-1] >= budget:
        raise ConfigError(
            f"probe.depths has {chosen[-1]}, which leaves nothing to continue: depths must be less than "
            f"rollout.max_response_tokens={budget}; set --config.probe.depths={max(budget // 2, 1)}"
        )
    return chosen


def long_enough(length_B: np.ndarray, depth: int) -> list[int]:
    """Return the rows whose responses have more than `depth` tokens, so that a cut there is inside."""
    return np.flatnonzero(np.asarray(length_B) > depth).tolist()


def figures_of(
    student: dict[int, list[Answer]], teacher: dict[int, list[Answer]]
) -> list[DepthFigures]:
    """Return accuracies, gain and drop by depth, paired over the problems.

    Answers (depth -> list) have the same order of problems at all depths.
    """
    alone = [answer.right for answer in teacher[0]]
    figures = []
    for depth in sorted(student):
        student_right = [answer.right for answer in student[depth]]
        teacher_right = [answer.right for answer in teacher[depth]]
        figures.append(
            DepthFigures(
                depth,
                student=mean(student_right),
                teacher=mean(teacher_right),
                gain=paired(teacher_right, student_right),
                drop=paired(teacher_right, alone),
                student_truncation_rate=mean([a.truncated for a in student[depth]]).value,
                teacher_truncation_rate=mean([a.truncated for a in teacher[depth]]).value,
            )
        )
    return figures


def probe(
    plan: Plan, student: models.Params, grader: Grader, progress: console.Progress
) -> tuple[dict[str, Any], str]:
    """Cut rollouts and let both models continue them. Return the report, and its tables as text."""
    setup = plan.setups[0]
    cuts = depths(plan.config.probe.depths, plan.config.rollout.max_response_tokens)
    writers = {
        Part.STUDENT: student_writer(plan),
        Part.TEACHER: teacher_writer(setup, plan.problems),
    }
    all_problems = range(len(plan.problems))
    rollout = write(
        plan, student, writers[Part.STUDENT], all_problems,
        part=Part.ROLLOUT, what="student: rollouts", progress=progress,
    )  # fmt: skip
    length_B = rollout.response_length_B
    which = long_enough(length_B, cuts[-1])
    longer = {depth: len(long_enough(length_B, depth)) for depth in cuts}
    if not which:
        raise DataError(
            f"none of {len(all_problems)} rollouts has more than {cuts[-1]} tokens, the largest of "
            f"probe.depths (the longest has {length_B.max()}); set --config.probe.depths="
            f"{max(int(np.median(length_B)) // 2, 1)}, or raise --config.probe.problems"
        )
    first = read(plan, rollout, writers[Part.STUDENT], all_problems, grader)
    responses = [rollout.response(i) for i in which]
    answers: dict[Part, dict[int, list[Answer]]] = {Part.STUDENT: {}, Part.TEACHER: {}}
    teacher, _ = load_teacher(setup, student)
    for part, params in ((Part.STUDENT, student), (Part.TEACHER, teacher)):
        writer, role = writers[part], part.name.lower()
        for depth in (0, *cuts):
            # All ids of a prefix are scored ids, which both models read alike. The only other ids that
            # are sampled are end tokens, which end a response and so lie after every cut.
            prefixes = [response[:depth] for response in responses] if depth else []
            if part is Part.TEACHER:
                prefixes = [setup.alignment.teacher_ids[prefix].tolist() for prefix in prefixes]
            what = f"{role}: behind {depth} tokens" if depth else f"{role}: alone"
            continuing = writer.behind(writers[Part.STUDENT]) if depth else writer
            written = write(
                plan, params, continuing, which,
                part=part, prefixes=prefixes, what=what, progress=progress,
            )  # fmt: skip
            answers[part][depth] = read(plan, written, continuing, which, grader, prefixes=prefixes)
    figures = figures_of(answers[Part.STUDENT], answers[Part.TEACHER])
    report = {
        "rollouts": summary(first),
        "rollouts_longer_than": {str(depth): count for depth, count in longer.items()},
        "depths": [dataclasses.asdict(row) for row in figures],
        "verdict": [line.as_json() for line in verdict.judge_continuation(figures)],
        "conclusion": verdict.conclude_continuation(figures),
        "records": _records(plan, which, first, answers),
    }
    return report, text(report, figures, teacher=setup.config.teacher.path)


def text(report: dict[str, Any], figures: Sequence[DepthFigures], *, teacher: str) -> str:
    """Format the report as text: which rollouts were cut, accuracies by depth, and the verdict."""
    count, rollouts = figures[0].gain.count, len(report["records"])
    deepest = figures[-1].depth
    lines = [
        "",
        f"{count} of {rollouts} rollouts have more than {deepest} tokens and are cut; the others are "
        "left out",
        f"(longer than {', '.join(f'{d}: {n}' for d, n in report['rollouts_longer_than'].items())}; "
        f"accuracy of all rollouts {report['rollouts']['accuracy']:.1%}); the same problems at every "
        "depth",
        "",
        f"{'prefix':>9}{'student':>17}{'teacher':>17}{'teacher - student':>22}"
        f"{'teacher - alone':>22}{'truncated':>13}",
    ]
    for row in figures:
        prefix = f"{row.depth}" if row.depth else "alone"
        drop = row.drop.signed if row.depth else ""
        truncated = f"{row.student_truncation_rate:.0%} / {row.teacher_truncation_rate:.0%}"
        lines.append(
            f"{prefix:>9}{row.student!s:>17}{row.teacher!s:>17}{row.gain.signed:>22}{drop:>22}{truncated:>13}"
        )
    lines += [
        "± standard error, of differences over the same problems; truncated: student / teacher",
        "",
        f"verdict: teacher, {teacher}",
        *verdict.lines_of(verdict.from_json(report["verdict"])),
        f"  => {report['conclusion']}",
        "",
        verdict.LEGEND,
    ]
    return "\n".join(lines)


def _records(
    plan: Plan,
    which: Sequence[int],
    first: Sequence[Answer],
    answers: dict[Part, dict[int, list[Answer]]],
) -> list[dict[str, Any]]:
    """Return one record per problem; `depths` is missing where the rollout was too short."""
    records = []
    for i, problem in enumerate(plan.problems):
        record = {
            "id": problem.id,
            "problem": problem.question,
            "gold": problem.answer,
            "rollout": first[i].as_json(),
        }
        if i in which:
            place = list(which).index(i)
            record["depths"] = {
                str(depth): {
                    part.name.lower(): answers[part][depth][place].as_json() for part in answers
                }
                for depth in answers[Part.STUDENT]
            }
        records.append(record)
    return records
