"""Verdicts on the figures of a probe: each judgement has its figure, its threshold and the source.

The papers report a handful of runs and few thresholds. Where they give none, the threshold is a rule of
thumb of this project and is marked as such. No verdict predicts the result of a run.
"""

import dataclasses
from collections.abc import Sequence
from enum import Enum

from opd_jax.tools.probe.means import Mean

OURS = "(ours)"
LEGEND = "(ours): a rule of thumb of this project, for which no paper gives a number"
CLEAR = 2.0  # a difference is clear from this many standard errors on; ours
FEW = 16  # with fewer problems, differences of accuracies are not judged; ours
OVERLAP, OVERLAP_LOW = 0.72, 0.5  # 2604.13016, 4.2: "from about 72% to above 91%"; low: ours
MASS = 0.97  # 2604.13016, B.1: "roughly 97%-99%"
KL_NEAR, KL_FAR, KL_TOO_FAR = 0.02, 1.0, 2.0  # nats per token; ours
TRUNCATED_7B, TRUNCATED_1_5B = 0.23, 0.5  # 2604.08527, 3.3, stable phase; figures second-hand
REPETITIVE, VERY_REPETITIVE = 0.02, 0.1  # 2604.08527, 3.3: "close to zero"; numbers: ours


class Rating(Enum):
    """Rating of a figure. Ratings are never combined into one score."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    BAD = "bad"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One line of a verdict: its subject, its rating, and the reason."""

    what: str
    rating: Rating
    why: str

    def as_json(self) -> dict[str, str]:
        """Return the fields in the format of a report."""
        return {"what": self.what, "rating": self.rating.value, "why": self.why}


def from_json(lines: Sequence[dict[str, str]]) -> list[Judgement]:
    """Return the judgements of a report."""
    return [Judgement(line["what"], Rating(line["rating"]), line["why"]) for line in lines]


def lines_of(judgements: Sequence[Judgement]) -> list[str]:
    """Format a verdict as lines of text."""
    return [f"  {line.rating.value:<9} {line.what:<21} {line.why}" for line in judgements]


@dataclasses.dataclass(frozen=True)
class PairFigures:
    """Figures by which a pair is judged.

    Attributes:
      overlap_ratio, student_overlap_mass, teacher_overlap_mass, reverse_kl, student_entropy,
        teacher_entropy: means over response tokens of the student's rollouts; nats where they apply.
      chance: the overlap ratio of two random sets, k / ids.
      gain: the teacher's accuracy minus the student's; None where no problem has an answer.
      truncation_rate, repetition_rate: of the student's rollouts.
      teacher_truncation_rate: of the teacher's own answers.
    """

    overlap_ratio: float
    chance: float
    student_overlap_mass: float
    teacher_overlap_mass: float
    reverse_kl: float
    student_entropy: float
    teacher_entropy: float
    gain: Mean | None
    truncation_rate: float
    repetition_rate: float
    teacher_truncation_rate: float


@dataclasses.dataclass(frozen=True)
class DepthFigures:
    """Accuracies after student prefixes of `depth` tokens (0: no prefix), on the same problems.

    `gain` is the teacher's accuracy minus the student's, `drop` the teacher's minus its own at depth 0.
    """

    depth: int
    student: Mean
    teacher: Mean
    gain: Mean
    drop: Mean
    student_truncation_rate: float
    teacher_truncation_rate: float


def clearly_above(difference: Mean) -> bool:
    """Return whether a difference is above 0 by more than CLEAR standard errors."""
    return difference.value > CLEAR * difference.stderr


def clearly_below(difference: Mean) -> bool:
    """Return whether a difference is below 0 by more than CLEAR standard errors."""
    return difference.value < -CLEAR * difference.stderr


def judge_pair(figures: PairFigures) -> list[Judgement]:
    """Return the judgements on a pair before training, the most informative first."""
    return [
        _overlap(figures),
        _mass(figures),
        _closeness(figures),
        _knowledge(figures.gain, figures.teacher_truncation_rate),
        _truncation(figures.truncation_rate),
        _repetition(figures.repetition_rate),
        _teacher_truncation(figures.teacher_truncation_rate),
    ]


def conclude_pair(judgements: Sequence[Judgement]) -> str:
    """Return one sentence with the first obstacle, or that there is none."""
    rated = {judgement.what: judgement.rating for judgement in judgements}
    if rated["new knowledge"] is Rating.BAD:
        return (
            "Not with this teacher: it is worse than the student on these problems, and OPD "
            "would make the student worse too (2604.13016, 3.3)."
        )
    if Rating.BAD in (rated["thinking patterns"], rated["closeness"]):
        return (
            "Not yet: the two models reason too differently. Start with a cold start on the teacher's "
            "solutions (docs/cold_start.md; 2604.13016, 5.1), or choose a teacher closer to the student."
        )
    if Rating.BAD in (rated["truncation"], rated["repetition"]):
        return (
            "Not yet: too many rollouts do not end by themselves. Raise "
            "rollout.max_response_tokens, or start with a cold start (docs/cold_start.md)."
        )
    if rated["new knowledge"] is Rating.DOUBTFUL:
        return (
            "Little gain expected: the teacher is not clearly better on these problems. More "
            "problems (--config.probe.problems) would show the difference more clearly."
        )
    doubts = [what for what, rating in rated.items() if rating is Rating.DOUBTFUL]
    if rated["new knowledge"] is Rating.UNKNOWN:
        others = "the rest looks fine" if not doubts else f"doubtful: {', '.join(doubts)}"
        return f"Undecided: whether the teacher knows more could not be measured; {others}."
    if doubts:
        return f"Worth a short trial; doubtful: {', '.join(doubts)}."
    return "Worth training: no figure here indicates a problem."


def compare(figures: dict[str, PairFigures]) -> list[str]:
    """Compare several teachers of one student: which is closest, and which is most accurate.

    Only teachers that are clearly better than the student are compared, where there are any.
    """
    better = {name: each for name, each in figures.items() if _knows_more(each.gain)}
    pool, kind = (better, "clearly better than the student") if better else (figures, "all")
    closest = max(pool, key=lambda name: pool[name].overlap_ratio)
    least = min(pool, key=lambda name: pool[name].reverse_kl)
    lines = [
        f"of {len(pool)} of {len(figures)} teachers ({kind}):",
        f"  highest overlap: {closest}, {pool[closest].overlap_ratio:.3f} (better results at "
        "similar scores: 2604.13016, 3.1)",
        f"  lowest reverse KL: {least}, {pool[least].reverse_kl:.3f} nats per token (closeness "
        "matters more than scores: 2605.11182)",
    ]
    gains = {name: each.gain for name, each in pool.items() if each.gain is not None}
    if gains:
        best = max(gains, key=lambda name: gains[name].value)
        lines.append(f"  most accurate: {best}, {gains[best].signed} over the student")
    return lines


def judge_continuation(rows: Sequence[DepthFigures]) -> list[Judgement]:
    """Return the judgements on a teacher that continues student prefixes; depths of `rows` rise from 0."""
    alone, deepest = rows[0], rows[-1]
    return [
        _gain(
            "alone", "the teacher's accuracy minus the student's:", alone.gain,
            "compare the gain after a prefix with it",
        ),
        _gain(
            f"behind {deepest.depth} tokens", "the teacher's accuracy minus the student's:",
            deepest.gain, "+37 points at 1K tokens, +2 at 16K in 2604.13016 (6.1)",
        ),
        _drop(deepest),
    ]  # fmt: skip


def conclude_continuation(rows: Sequence[DepthFigures]) -> str:
    """Return one sentence: up to which depth the teacher clearly helps."""
    if rows[0].gain.count < FEW:
        return (
            f"Undecided: {rows[0].gain.count} problems are too few; raise --config.probe.problems."
        )
    helps = [row.depth for row in rows if clearly_above(row.gain)]
    if not helps:
        return (
            "The teacher does not clearly help at any depth measured, nor with answers of its own."
        )
    fails = [row.depth for row in rows if not clearly_above(row.gain) and row.depth > helps[0]]
    if not fails:
        return (
            f"The teacher clearly helps at every depth from {helps[0]} to {helps[-1]} tokens: "
            "there is no reason here for shorter rollouts."
        )
    return (
        f"The gain is not clear at {', '.join(map(str, fails))} tokens: the teacher's signal there "
        "may be weak. Compare with a run with a smaller rollout.max_response_tokens (2604.13016, 6.1: "
        "responses of moderate length worked best)."
    )


def _knows_more(gain: Mean | None) -> bool:
    return gain is not None and gain.count >= FEW and clearly_above(gain)


def _rate(value: float, good: float, bad: float) -> Rating:
    """Rate a figure for which higher is better."""
    if value >= good:
        return Rating.GOOD
    return Rating.BAD if value < bad else Rating.DOUBTFUL


def _overlap(figures: PairFigures) -> Judgement:
    why = (
        f"overlap ratio {figures.overlap_ratio:.3f}; the successful run of 2604.13016 (4.2) began at "
        f"{OVERLAP}, below {OVERLAP_LOW} is far apart {OURS}"
    )
    if figures.chance > 0.1:
        why += f"; with so few ids, chance alone gives {figures.chance:.2f}"
    rating = _rate(figures.overlap_ratio, OVERLAP, OVERLAP_LOW)
    return Judgement("thinking patterns", rating, why)


def _mass(figures: PairFigures) -> Judgement:
    """Never rated bad: at high entropy the top k ids of a model have less mass, shared or not."""
    least = min(figures.student_overlap_mass, figures.teacher_overlap_mass)
    why = (
        f"shared ids have {figures.student_overlap_mass:.1%} of the student's and "
        f"{figures.teacher_overlap_mass:.1%} of the teacher's probability; 97% to 99% in 2604.13016 "
        f"(B.1), also less at high entropy (here {figures.student_entropy:.2f} and "
        f"{figures.teacher_entropy:.2f})"
    )
    return Judgement("shared mass", Rating.GOOD if least >= MASS else Rating.DOUBTFUL, why)


def _closeness(figures: PairFigures) -> Judgement:
    kl = figures.reverse_kl
    why = (
        f"reverse KL {kl:.3f} nats per token; below {KL_NEAR} there is little to learn, above {KL_FAR:g} "
        f"it is large, above {KL_TOO_FAR:g} too large {OURS}; closeness matters more than scores "
        "(2605.11182)"
    )
    rating = Rating.GOOD if KL_NEAR <= kl <= KL_FAR else Rating.DOUBTFUL
    return Judgement("closeness", Rating.BAD if kl > KL_TOO_FAR else rating, why)


def _knowledge(gain: Mean | None, truncated: float) -> Judgement:
    if gain is None:
        return Judgement("new knowledge", Rating.UNKNOWN, "the problems have no answers")
    source = "a higher score need not mean new knowledge (2604.13016, 3.2)"
    judged = _gain("new knowledge", "the teacher's accuracy minus the student's:", gain, source)
    if truncated > TRUNCATED_7B and judged.rating in (Rating.DOUBTFUL, Rating.BAD):
        why = f"{judged.why}; {truncated:.0%} of its answers were truncated, so this is not informative"
        return dataclasses.replace(judged, rating=Rating.UNKNOWN, why=why)
    return judged


def _gain(what: str, meaning: str, gain: Mean, source: str) -> Judgement:
    """Judge a difference of accuracies that should be above 0."""
    why = f"{meaning} {gain.signed} on {gain.count} problems"
    if gain.count < FEW:
        return Judgement(what, Rating.UNKNOWN, f"{why}, fewer than {FEW} {OURS}; {source}")
    if gain.value == gain.stderr == 0:
        return Judgement(
            what,
            Rating.UNKNOWN,
            f"{why}: both models have the same grades on all of them; {source}",
        )
    if clearly_above(gain):
        rating, result = Rating.GOOD, "clearly above 0"
    elif clearly_below(gain):
        rating, result = Rating.BAD, "clearly below 0"
    else:
        rating, result = Rating.DOUBTFUL, "not clearly above 0"
    return Judgement(
        what, rating, f"{why}, {result} (threshold {CLEAR:g} standard errors, ours); {source}"
    )


def _drop(row: DepthFigures) -> Judgement:
    """Judge how much the student's prefixes lower the teacher's accuracy; never rated bad."""
    what, why = (
        "student prefixes",
        f"the teacher's accuracy there minus its own alone: {row.drop.signed}",
    )
    source = "-16.1 points (62.1% to 46.0%) in 2605.11182"
    if row.drop.count < FEW:
        return Judgement(what, Rating.UNKNOWN, f"{why}, too few problems; {source}")
    clear = clearly_below(row.drop)
    result = f"{'a' if clear else 'no'} clear drop (threshold {CLEAR:g} standard errors, ours)"
    return Judgement(what, Rating.DOUBTFUL if clear else Rating.GOOD, f"{why}, {result}; {source}")


def _truncation(rate: float) -> Judgement:
    why = (
        f"{rate:.1%} of the rollouts; {TRUNCATED_7B:.0%} (7B) and {TRUNCATED_1_5B:.0%} (1.5B) in the "
        "stable phase of 2604.08527 (3.3, figures second-hand)"
    )
    return Judgement("truncation", _rate(-rate, -TRUNCATED_7B, -TRUNCATED_1_5B), why)


def _repetition(rate: float) -> Judgement:
    why = (
        f"{rate:.1%} of the rollouts; close to 0 in the stable phase of 2604.08527 (3.3), doubtful "
        f"above {REPETITIVE:.0%}, bad above {VERY_REPETITIVE:.0%} {OURS}"
    )
    return Judgement("repetition", _rate(-rate, -REPETITIVE, -VERY_REPETITIVE), why)


def _teacher_truncation(rate: float) -> Judgement:
    why = (
        f"{rate:.1%} of its own answers; above {TRUNCATED_7B:.0%} its accuracy is not informative, "
        f"and the student learns its lengths {OURS}"
    )
    rating = Rating.GOOD if rate <= TRUNCATED_7B else Rating.DOUBTFUL
    return Judgement("teacher's truncation", rating, why)
