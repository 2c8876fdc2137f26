"""`pair`: compare a student with one or more teachers before training.

The student samples one rollout per problem. Each teacher scores it together with the student, and answers
the problems itself. verdict.py judges the figures.
"""

import dataclasses
from typing import Any

import numpy as np

from opd_jax import metrics, models, scoring
from opd_jax.grading.grader import Grader, decided
from opd_jax.metrics.correctness import sequence_reward
from opd_jax.metrics.timing import Clock
from opd_jax.tools.probe import verdict
from opd_jax.tools.probe.means import Mean, mean, paired
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
from opd_jax.training import batch
from opd_jax.training.setup import Setup
from opd_jax.types import Rollout, Scores
from opd_jax.workdir import console

# Columns of the printed table: head, name of the figure, format.
_COLUMNS = (
    ("overlap", "overlap_ratio", ".3f"), ("mass S", "student_overlap_mass", ".3f"),
    ("mass T", "teacher_overlap_mass", ".3f"), ("rev. KL", "reverse_kl", ".3f"),
    ("adv.", "advantage_mean", "+.3f"), ("right", "advantage_right", "+.3f"),
    ("wrong", "advantage_wrong", "+.3f"), ("adv. ov.", "overlap_advantage", "+.4f"),
    ("H(S)", "student_entropy", ".3f"), ("H(T)", "teacher_entropy", ".3f"),
    ("gap", "entropy_gap", ".3f"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures of one teacher on the student's rollouts, and its own answers.

    A figure is None where nothing could be measured; `by_rollout` has one entry per rollout.
    """

    name: str
    path: str
    figures: dict[str, float | None]
    gain: Mean | None
    answers: list[Answer]
    by_rollout: list[dict[str, float | None]]
    speed: dict[str, float]


def probe(
    plan: Plan, student: models.Params, grader: Grader, progress: console.Progress
) -> tuple[dict[str, Any], str]:
    """Measure every teacher. Returns the report, and its tables and verdicts as text."""
    writer = student_writer(plan)
    all_problems = range(len(plan.problems))
    clock = Clock()
    rollout = write(
        plan, student, writer, all_problems,
        part=Part.ROLLOUT, what="student: rollouts", progress=progress,
    )  # fmt: skip
    clock.lap("rollout", rollout.response_length_B.sum())
    answers = read(plan, rollout, writer, all_problems, grader)
    names = ["teacher"]
    if len(plan.setups) > 1:
        names = [f"teacher {i + 1}" for i in range(len(plan.setups))]
    measured = [
        _measure(plan, setup, name, student, rollout, answers, grader, progress)
        for setup, name in zip(plan.setups, names, strict=True)
    ]
    report = _report(plan, answers, measured, clock.row())
    return report, text(report, plan.config.scoring.overlap_top_k)


def sequence_means(values_BT: np.ndarray, mask_BT: np.ndarray) -> list[float | None]:
    """Return r(y) = 1/T sum_t values_t over each row's masked tokens (2604.13016, 6.2); None without any."""
    means_B = sequence_reward(np.asarray(values_BT), mask_BT)
    return [None if np.isnan(mean_) else float(mean_) for mean_ in means_B]


def by_outcome(rewards: list[float | None], answers: list[Answer]) -> dict[str, float | None]:
    """Return the mean of the rollouts' mean advantages for correct and for incorrect rollouts."""
    means: dict[str, float | None] = {}
    for name, right in (("advantage_right", 1.0), ("advantage_wrong", 0.0)):
        chosen = [
            reward
            for reward, answer in zip(rewards, answers, strict=True)
            if reward is not None and decided(answer.grade) and answer.right == right
        ]
        means[name] = mean(chosen).value if chosen else None
    return means


def gain(teacher: list[Answer], student: list[Answer]) -> Mean | None:
    """Return the teacher's accuracy minus the student's over the problems on which both have a grade.

    None if there are no such problems. A time-out is not a grade.
    """
    pairs = zip(teacher, student, strict=True)
    both = [(t, s) for t, s in pairs if decided(t.grade) and decided(s.grade)]
    if not both:
        return None
    return paired([t.right for t, _ in both], [s.right for _, s in both])


def text(report: dict[str, Any], top_k: int) -> str:
    """Format the report as text: answers, figures, speed, and a verdict for each teacher."""
    teachers = report["teachers"]
    lines = ["", console.table({"student": report["student"]["answers"]} | {
        teacher["name"]: teacher["answers"] for teacher in teachers
    })]  # fmt: skip
    figures = teachers[0]["figures"]
    tokens = f"{figures['tokens']:,} tokens"
    if figures["unscored_tokens"]:
        tokens += f", {figures['unscored_tokens']:,} more not scored"
    lines += ["", f"on the student's rollouts ({tokens}; S student, T teacher, k = {top_k}, nats)"]
    lines.append(" " * 12 + "".join(f"{head:>9}" for head, _, _ in _COLUMNS))
    for teacher in teachers:
        cells = (_cell(teacher["figures"][key], form) for _, key, form in _COLUMNS)
        lines.append(f"{teacher['name']:12}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(
        "adv. = mean of log T - log S (right, wrong: mean over such rollouts; adv. ov.: on the "
        "shared top-k ids)"
    )
    speed = report["student"]["speed"]
    lines.append(
        f"{speed['speed/rollout_tokens_per_s']:,.0f} tokens/s written by the student; "
        + "; ".join(
            f"{t['name']} {t['speed']['speed/answer_tokens_per_s']:,.0f} written, "
            f"{t['speed']['speed/score_tokens_per_s']:,.0f} scored"
            for t in teachers
        )
        + " (compilation included)"
    )
    for teacher in teachers:
        lines += ["", f"verdict: {teacher['name']}, {teacher['path']}"]
        lines += verdict.lines_of(verdict.from_json(teacher["verdict"]))
        lines.append(f"  => {teacher['conclusion']}")
    if report["comparison"]:
        lines += ["", *report["comparison"]]
    lines += [
        "",
        verdict.LEGEND,
        "The verdicts rest on a handful of published runs. They rank pairs and do not predict a run.",
    ]
    return "\n".join(lines)


def _measure(
    plan: Plan,
    setup: Setup,
    name: str,
    student: models.Params,
    rollout: Rollout,
    answers: list[Answer],
    grader: Grader,
    progress: console.Progress,
) -> Measured:
    teacher, scorer = load_teacher(setup, student)
    writer = teacher_writer(setup, plan.problems)
    all_problems = range(len(plan.problems))
    clock = Clock()
    scores, mask_BT = _score(plan, setup, student, scorer, writer.prompts, rollout)
    progress.show(f"{name}: the student's rollouts scored", always=True)
    clock.lap("score", rollout.response_length_B.sum())
    written = write(
        plan, teacher, writer, all_problems,
        part=Part.TEACHER, what=f"{name}: own answers", progress=progress,
    )  # fmt: skip
    clock.lap("answer", written.response_length_B.sum())
    teacher_answers = read(plan, written, writer, all_problems, grader)
    figures: dict[str, float | None] = {
        key.removeprefix("score/"): value
        for key, value in metrics.score_metrics(scores, mask_BT).items()
    }
    per_token = {
        "advantage": scores.teacher_logprob_BT - scores.student_logprob_BT,
        "reverse_kl": scores.reverse_kl_BT,
        "overlap_ratio": scores.overlap_ratio_BT,
    }
    means = {key: sequence_means(values_BT, mask_BT) for key, values_BT in per_token.items()}
    figures |= by_outcome(means["advantage"], answers)
    figures["tokens"] = int(mask_BT.sum())
    figures["unscored_tokens"] = int(rollout.response_mask_BT.sum() - mask_BT.sum())
    figures["overlap_by_chance"] = plan.config.scoring.overlap_top_k / int(
        setup.alignment.scored.sum()
    )
    by_rollout = [{key: values[i] for key, values in means.items()} for i in all_problems]
    return Measured(
        name,
        setup.config.teacher.path,
        figures,
        gain(teacher_answers, answers),
        teacher_answers,
        by_rollout,
        clock.row(),
    )


def _score(
    plan: Plan,
    setup: Setup,
    student: models.Params,
    scorer: models.Params,
    prompts: list[list[int]],
    rollout: Rollout,
) -> tuple[Scores, np.ndarray]:
    """Return the scores of both models on the rollouts, and a mask of the tokens that count."""
    config, alignment = plan.config, setup.alignment
    teacher_rows = None
    if setup.separate_prompts:
        width = max(map(len, prompts)) + config.rollout.max_response_tokens
        teacher_rows = batch.teacher_rows(rollout, prompts, alignment.teacher_ids, width=width)
    scores = scoring.score(
        setup.spec.models(student, scorer),
        rollout.tokens_BT,
        rollout.length_B,
        setup.spec.scoring.replace(support=None, keep_hidden=False),
        microbatch_tokens=config.optim.microbatch_tokens,
        first_B=rollout.prompt_length_B,
        teacher_rows=teacher_rows,
    )
    return scores, batch.scored_mask(rollout, alignment.counted, setup.first_pieces)


def _report(
    plan: Plan, answers: list[Answer], measured: list[Measured], speed: dict[str, float]
) -> dict[str, Any]:
    student = summary(answers)
    figures = {each.name: _judged(each, student) for each in measured}
    teachers = []
    for each in measured:
        judgements = verdict.judge_pair(figures[each.name])
        teachers.append(
            {
                "name": each.name,
                "path": each.path,
                "figures": each.figures,
                "gain": each.gain and dataclasses.asdict(each.gain),
                "answers": summary(each.answers),
                "speed": each.speed,
                "verdict": [line.as_json() for line in judgements],
                "conclusion": verdict.conclude_pair(judgements),
            }
        )
    records = [
        {
            "id": problem.id,
            "problem": problem.question,
            "gold": problem.answer,
            "student": answers[i].as_json(),
        }
        | {each.name: each.answers[i].as_json() | each.by_rollout[i] for each in measured}
        for i, problem in enumerate(plan.problems)
    ]
    return {
        "student": {"answers": student, "speed": speed},
        "teachers": teachers,
        "comparison": verdict.compare(figures) if len(figures) > 1 else [],
        "records": records,
    }


def _judged(measured: Measured, student: dict[str, float]) -> verdict.PairFigures:
    names = (
        "overlap_ratio", "student_overlap_mass", "teacher_overlap_mass", "reverse_kl",
        "student_entropy", "teacher_entropy",
    )  # fmt: skip
    return verdict.PairFigures(
        **{name: float(measured.figures[name] or 0.0) for name in names},
        chance=float(measured.figures["overlap_by_chance"] or 0.0),
        gain=measured.gain,
        truncation_rate=student["truncation_rate"],
        repetition_rate=student["repetition_rate"],
        teacher_truncation_rate=summary(measured.answers)["truncation_rate"],
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
