"""What the figures of a probe say in plain words: each judgement with its figure, threshold, source.

The papers saw a handful of runs and give few thresholds; where they give none the number here is our
own rule of thumb and is called so. None of this forecasts a run.
"""

import dataclasses
from collections.abc import Sequence
from enum import Enum

from opd_jax.tools.probe.means import Mean

OURS = "(ours)"
LEGEND = "(ours): a rule of thumb of this project, for which no paper gives a number"
CLEAR = 2.0  # standard errors by which a difference must differ from 0; ours
FEW = 16  # problems below which no difference of accuracies is judged; ours
OVERLAP, OVERLAP_LOW = 0.72, 0.5  # 2604.13016, 4.2: "from about 72% to above 91%"; low: ours
MASS = 0.97  # 2604.13016, B.1: "roughly 97%-99%"
KL_NEAR, KL_FAR, KL_TOO_FAR = 0.02, 1.0, 2.0  # nats a token; ours
TRUNCATED_7B, TRUNCATED_1_5B = 0.23, 0.5  # 2604.08527, 3.3, stable phase; figures second-hand
REPETITIVE, VERY_REPETITIVE = 0.02, 0.1  # 2604.08527, 3.3: "close to zero"; numbers: ours


class Rating(Enum):
    """How a figure speaks; the four are never merged."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    BAD = "bad"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One line of a verdict: what it is about, how it looks, and why."""

    what: str
    rating: Rating
    why: str

    def as_json(self) -> dict[str, str]:
        """The fields, as a report holds them."""
        return {"what": self.what, "rating": self.rating.value, "why": self.why}


def from_json(lines: Sequence[dict[str, str]]) -> list[Judgement]:
    """The judgements that a report holds."""
    return [Judgement(line["what"], Rating(line["rating"]), line["why"]) for line in lines]


def lines_of(judgements: Sequence[Judgement]) -> list[str]:
    """A verdict as a person sees it."""
    return [f"  {each.rating.value:<9} {each.what:<21} {each.why}" for each in judgements]


@dataclasses.dataclass(frozen=True)
class PairFigures:
    """What a pair is judged by.

    Attributes:
      overlap_ratio, student_overlap_mass, teacher_overlap_mass, reverse_kl: means over response
        tokens of the student's rollouts; so are student_entropy and teacher_entropy, in nats.
      chance: the overlap ratio of two random sets, k / ids.
      gain: the teacher's accuracy less the student's; None where no problem has an answer.
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
    """Accuracies behind student prefixes of `depth` tokens (0: none), over the same problems.

    `gain` is the teacher's accuracy less the student's; `drop` the teacher's less its own at depth 0.
    """

    depth: int
    student: Mean
    teacher: Mean
    gain: Mean
    drop: Mean
    student_truncation_rate: float
    teacher_truncation_rate: float


def clearly_above(difference: Mean) -> bool:
    """Whether a difference is above 0 by more than CLEAR standard errors."""
    return difference.value > CLEAR * difference.stderr


def clearly_below(difference: Mean) -> bool:
    """Whether a difference is below 0 by more than CLEAR standard errors."""
    return difference.value < -CLEAR * difference.stderr


def judge_pair(figures: PairFigures) -> list[Judgement]:
    """The judgements on a pair before training, the most telling first."""
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
    """One sentence: the first thing in the way, or that nothing is."""
    rated = {judgement.what: judgement.rating for judgement in judgements}
    if rated["new knowledge"] is Rating.BAD:
        return (
            "Not with this teacher: it is worse than the student on these problems, and OPD "
            "would take the student there (2604.13016, 3.3)."
        )
    if Rating.BAD in (rated["thinking patterns"], rated["closeness"]):
        return (
            "Not yet: the two think too differently. First a cold start on the teacher's solutions "
            "(docs/cold_start.md; 2604.13016, 5.1), or a teacher nearer to the student."
        )
    if Rating.BAD in (rated["truncation"], rated["repetition"]):
        return (
            "Not yet: too many rollouts do not end by themselves. Raise "
            "rollout.max_response_tokens, or first a cold start (docs/cold_start.md)."
        )
    if rated["new knowledge"] is Rating.DOUBTFUL:
        return (
            "Little to expect: the teacher is not clearly better on these problems. More problems "
            "(--config.probe.problems) make the difference clearer."
        )
    doubts = [what for what, rating in rated.items() if rating is Rating.DOUBTFUL]
    if rated["new knowledge"] is Rating.UNKNOWN:
        near = "the rest looks fine" if not doubts else f"doubtful: {', '.join(doubts)}"
        return f"Open: whether the teacher knows more could not be measured; {near}."
    if doubts:
        return f"Worth a short trial; doubtful: {', '.join(doubts)}."
    return "Worth training: no figure here speaks against it."


def compare(figures: dict[str, PairFigures]) -> list[str]:
    """Several teachers of one student: of those that know more, which is closest, which scores best."""
    better = {name: given for name, given in figures.items() if _knows_more(given.gain)}
    pool, of = (better, "clearly better than the student") if better else (figures, "all")
    closest = max(pool, key=lambda name: pool[name].overlap_ratio)
    least = min(pool, key=lambda name: pool[name].reverse_kl)
    lines = [
        f"of {len(pool)} of {len(figures)} teachers ({of}):",
        f"  highest overlap: {closest}, {pool[closest].overlap_ratio:.3f} (taught better at like "
        "scores: 2604.13016, 3.1)",
        f"  lowest reverse KL: {least}, {pool[least].reverse_kl:.3f} nats a token (closeness counts "
        "for more than scores: 2605.11182)",
    ]
    gains = {name: given.gain for name, given in pool.items() if given.gain is not None}
    if gains:
        best = max(gains, key=lambda name: gains[name].value)
        lines.append(f"  most accurate: {best}, {gains[best].signed} over the student")
    return lines


def judge_continuation(rows: Sequence[DepthFigures]) -> list[Judgement]:
    """The judgements on a teacher that continues student prefixes; rows by rising depth from 0."""
    alone, deepest = rows[0], rows[-1]
    return [
        _gain(
            "alone", "the teacher's accuracy less the student's", alone.gain,
            "the gain behind a prefix is to be held against it",
        ),
        _gain(
            f"behind {deepest.depth} tokens", "the teacher's accuracy less the student's",
            deepest.gain, "+37 points at 1K tokens, +2 at 16K in 2604.13016 (6.1)",
        ),
        _drop(deepest),
    ]  # fmt: skip


def conclude_continuation(rows: Sequence[DepthFigures]) -> str:
    """One sentence: down to which depth the teacher clearly helps."""
    if rows[0].gain.count < FEW:
        return f"Open: {rows[0].gain.count} problems are too few; raise --config.probe.problems."
    helps = [row.depth for row in rows if clearly_above(row.gain)]
    if not helps:
        return "The teacher does not clearly help at any depth measured, its own answers included."
    fails = [row.depth for row in rows if not clearly_above(row.gain) and row.depth > helps[0]]
    if not fails:
        return (
            f"The teacher clearly helps at every depth from {helps[0]} to {helps[-1]} tokens: "
            "nothing here speaks for shorter rollouts."
        )
    return (
        f"The gain is not clear at {', '.join(map(str, fails))} tokens: what the teacher says there "
        "may teach little. Compare a run with a smaller rollout.max_response_tokens (2604.13016, "
        "6.1: responses of moderate length taught best)."
    )


def _knows_more(gain: Mean | None) -> bool:
    return gain is not None and gain.count >= FEW and clearly_above(gain)


def _rate(value: float, good: float, bad: float) -> Rating:
    """Of a figure that is better the higher it is."""
    if value >= good:
        return Rating.GOOD
    return Rating.BAD if value < bad else Rating.DOUBTFUL


def _overlap(figures: PairFigures) -> Judgement:
    why = (
        f"overlap ratio {figures.overlap_ratio:.3f}; {OVERLAP} where the run of 2604.13016 (4.2) that "
        f"worked began, far apart below {OVERLAP_LOW} {OURS}"
    )
    if figures.chance > 0.1:
        why += f"; with so few ids chance alone gives {figures.chance:.2f}"
    rating = _rate(figures.overlap_ratio, OVERLAP, OVERLAP_LOW)
    return Judgement("thinking patterns", rating, why)


def _mass(figures: PairFigures) -> Judgement:
    """Never bad in itself: where a model is unsure, its own top k hold less than all, shared or not."""
    least = min(figures.student_overlap_mass, figures.teacher_overlap_mass)
    why = (
        f"shared ids hold {figures.student_overlap_mass:.1%} of the student's and "
        f"{figures.teacher_overlap_mass:.1%} of the teacher's probability; 97% to 99% in 2604.13016 "
        f"(B.1), less also where models are unsure (entropies {figures.student_entropy:.2f}, "
        f"{figures.teacher_entropy:.2f})"
    )
    return Judgement("shared mass", Rating.GOOD if least >= MASS else Rating.DOUBTFUL, why)


def _closeness(figures: PairFigures) -> Judgement:
    kl = figures.reverse_kl
    why = (
        f"reverse KL {kl:.3f} nats a token; little to learn below {KL_NEAR}, far above {KL_FAR:g}, "
        f"too far above {KL_TOO_FAR:g} {OURS}; closeness counts for more than scores (2605.11182)"
    )
    rating = Rating.GOOD if KL_NEAR <= kl <= KL_FAR else Rating.DOUBTFUL
    return Judgement("closeness", Rating.BAD if kl > KL_TOO_FAR else rating, why)


def _knowledge(gain: Mean | None, truncated: float) -> Judgement:
    if gain is None:
        return Judgement("new knowledge", Rating.UNKNOWN, "the problems have no answers")
    source = "a higher score need not be new knowledge (2604.13016, 3.2)"
    judged = _gain("new knowledge", "the teacher's accuracy less the student's", gain, source)
    if truncated > TRUNCATED_7B and judged.rating in (Rating.DOUBTFUL, Rating.BAD):
        why = f"{judged.why}; {truncated:.0%} of its answers were cut off, so this says little"
        return dataclasses.replace(judged, rating=Rating.UNKNOWN, why=why)
    return judged


def _gain(what: str, meaning: str, gain: Mean, source: str) -> Judgement:
    """A difference of accuracies that should be above 0."""
    why = f"{meaning} {gain.signed} on {gain.count} problems"
    if gain.count < FEW:
        return Judgement(what, Rating.UNKNOWN, f"{why}, wanted at least {FEW} {OURS}; {source}")
    if gain.value == gain.stderr == 0:
        return Judgement(what, Rating.UNKNOWN, f"{why}: none of them tells the two apart; {source}")
    if clearly_above(gain):
        rating, tells = Rating.GOOD, "clearly above 0"
    elif clearly_below(gain):
        rating, tells = Rating.BAD, "clearly below 0"
    else:
        rating, tells = Rating.DOUBTFUL, "not clearly above 0"
    return Judgement(what, rating, f"{why}, {tells} by {CLEAR:g} standard errors {OURS}; {source}")


def _drop(row: DepthFigures) -> Judgement:
    """What the student's prefixes cost the teacher; never bad in itself, for OPD lives with it."""
    what, why = "student prefixes", f"the teacher there less itself alone {row.drop.signed}"
    source = "-16.1 points (62.1% to 46.0%) in 2605.11182"
    if row.drop.count < FEW:
        return Judgement(what, Rating.UNKNOWN, f"{why}, too few problems; {source}")
    clear = clearly_below(row.drop)
    tells = f"{'a' if clear else 'no'} clear drop by {CLEAR:g} standard errors {OURS}"
    return Judgement(what, Rating.DOUBTFUL if clear else Rating.GOOD, f"{why}, {tells}; {source}")


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
        f"{rate:.1%} of its own answers; above {TRUNCATED_7B:.0%} its accuracy says little, and the "
        f"student is taught its lengths {OURS}"
    )
    rating = Rating.GOOD if rate <= TRUNCATED_7B else Rating.DOUBTFUL
    return Judgement("teacher's truncation", rating, why)
