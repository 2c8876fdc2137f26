"""Two tokenizers side by side: which ids mean the same, and what becomes of those that do not.

Student and teacher share the ids of a response, so an id must mean the same text to both. Models of
one family agree on ordinary ids and may differ in special ones: 151645 ends a turn for Qwen2.5 and
opens one for R1-Distill-Qwen. Log-probs of both models are taken over the ids that are *scored*;
the others, and the padding rows of either model's output matrix, carry no mass.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.data import seam
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Differing:
    """A special id of the student that the teacher reads otherwise, and what is done about it."""

    id: int
    student: str
    teacher: str
    treatment: str


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How the teacher reads the student's ids.

    Attributes:
      vocabulary: ids that the student's tokenizer knows (its output matrix may have more rows).
      teacher_ids: int32 [vocabulary], the teacher's id for each of the student's.
      scored: bool [vocabulary], ids over which both models' log-probs are normalised.
      drawn: bool [vocabulary], ids a rollout may hold: the scored ones and the end tokens.
      stop_ids: the student's end tokens, and those of its ids that the teacher reads as its own.
      differing: special ids with two meanings.
      missing: how many of the student's ids the teacher does not have.
    """

    vocabulary: int
    teacher_ids: np.ndarray
    scored: np.ndarray
    drawn: np.ndarray
    stop_ids: tuple[int, ...]
    differing: tuple[Differing, ...] = ()
    missing: int = 0

    @property
    def renumbered(self) -> bool:
        """Whether the teacher calls any scored id by another number."""
        own = np.arange(self.vocabulary)
        return bool((self.teacher_ids != own)[self.scored].any())


def alone(vocabulary: int, stop_ids: Sequence[int]) -> Alignment:
    """The alignment of a run in which no other tokenizer takes part: every id counts."""
    ids, all_of_them = np.arange(vocabulary, dtype=np.int32), np.ones(vocabulary, bool)
    stops = tuple(i for i in dict.fromkeys(stop_ids) if i < vocabulary)
    return Alignment(vocabulary, ids, all_of_them, all_of_them, stops)


def align(
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    student_ends: Sequence[int],
    teacher_ends: Sequence[int],
    student_rows: int,
    teacher_rows: int,
    special_tokens: str,
) -> Alignment:
    """Compare two tokenizers id by id.

    `*_ends` are the end tokens, `*_rows` the rows of the output matrices. `special_tokens` says what
    becomes of special ids with two meanings: "remap" gives the student's token the teacher's id of
    the same text, or of its end token where both end a response, and masks the rest; "mask" masks
    them all: never scored, and drawn only where they end a response; "keep" compares numbers.

    Raises ModelError where ordinary ids differ: the two models do not share a vocabulary.
    """
    mine, theirs = _texts(student, student_rows), _texts(teacher, teacher_rows)
    vocabulary = len(mine)
    ids = np.arange(vocabulary, dtype=np.int32)
    theirs += [""] * (vocabulary - len(theirs))
    both = np.array([bool(mine[i] and theirs[i]) for i in range(vocabulary)])
    same = both & np.array([mine[i] == theirs[i] for i in range(vocabulary)])
    _require_ordinary_ids(student, teacher, mine, theirs, both & ~same)
    if special_tokens == "keep":
        stops = [i for i in dict.fromkeys([*student_ends, *teacher_ends]) if i < vocabulary]
        drawn = both.copy()
        drawn[stops] = True
        return Alignment(
            vocabulary, ids, both, drawn, tuple(stops), (), _missing(mine, theirs, both)
        )
    scored = same.copy()
    treatment = dict.fromkeys(np.flatnonzero(~same).tolist(), "masked")
    if special_tokens == "remap":
        pairs = _same_role(mine, theirs, same, student_ends, teacher_ends)
        for i, (target, why) in pairs.items():
            ids[i], scored[i] = target, True
            treatment[i] = f"remapped to {theirs[target]} ({target}): {why}"
    ends = set(teacher_ends)
    stops = [i for i in student_ends if i < vocabulary]
    stops += [i for i in range(vocabulary) if scored[i] and int(ids[i]) in ends]
    drawn = scored.copy()
    drawn[stops] = True
    differing = tuple(
        Differing(i, mine[i], theirs[i] or "nothing", what)
        for i, what in treatment.items()
        if both[i] or scored[i]
    )
    return Alignment(
        vocabulary, ids, scored, drawn, tuple(dict.fromkeys(stops)), differing,
        _missing(mine, theirs, scored),
    )  # fmt: skip


def report(
    alignment: Alignment, student: Tokenizer, teacher: Tokenizer, *, rows: tuple[int, int]
) -> list[str]:
    """Lines for the start of a run: shared ids, padding, end tokens, and ids with two meanings.

    `rows` are those of the student's and the teacher's output matrix.
    """
    texts = student.hf.convert_ids_to_tokens(list(alignment.stop_ids))
    ends = ", ".join(f"{t} ({i})" for t, i in zip(texts, alignment.stop_ids, strict=True))
    padding = "" if rows == (alignment.vocabulary,) * 2 else f", of {rows[0]} and {rows[1]} rows"
    lines = [
        f"tokens: {int(alignment.scored.sum()):,} of {alignment.vocabulary:,} ids scored by both "
        f"models{padding}; a response ends at {ends}"
    ]
    if alignment.missing:
        lines.append(f"  {alignment.missing} ids of the student are unknown to the teacher: masked")
    lines += [
        f"  id {d.id}: {d.student} to the student, {d.teacher} to the teacher: {d.treatment}"
        for d in alignment.differing
    ]
    lines += _boundary(student, teacher)
    return lines


def _boundary(student: Tokenizer, teacher: Tokenizer) -> list[str]:
    """How the two prompts end, where one of them opens the thinking and the other leaves it to do."""
    ends = [t.render("?").rpartition("?")[2] for t in (student, teacher)]
    opens = [seam.opening(end, closed=False) for end in ends]
    if bool(opens[0]) == bool(opens[1]):
        return []
    return [
        f"  the student's prompt ends {ends[0]!r}, the teacher's {ends[1]!r}: only one of them opens "
        f"{max(opens).strip()}, so the other's first tokens are penalised for it; give both the same "
        "kind of template (--config.student.chat_template, --config.teacher.chat_template) or mask "
        "the pieces where they first occur (--config.scoring.mask_first)"
    ]


def _missing(mine: list[str], theirs: list[str], scored: np.ndarray) -> int:
    """How many of the student's tokens the teacher knows under no id."""
    return sum(bool(text) and not theirs[i] and not scored[i] for i, text in enumerate(mine))


def _texts(tokenizer: Tokenizer, rows: int) -> list[str]:
    """Token strings by id, empty where there is none; ids beyond the output matrix do not exist."""
    texts = [""] * min(tokenizer.size, rows)
    for text, i in tokenizer.vocabulary().items():
        if i < len(texts):
            texts[i] = text
    return texts


def _require_ordinary_ids(
    student: Tokenizer, teacher: Tokenizer, mine: list[str], theirs: list[str], differ: np.ndarray
) -> None:
    special = student.added() | teacher.added()
    ordinary = [i for i in np.flatnonzero(differ).tolist() if i not in special]
    if ordinary:
        i = ordinary[0]
        raise ModelError(
            f"the tokenizers of {student.path} and {teacher.path} read {len(ordinary)} ordinary ids "
            f"differently (id {i} is {mine[i]!r} and {theirs[i]!r}), wanted one vocabulary; "
            "use a student and a teacher of one tokenizer family"
        )


def _same_role(
    mine: list[str],
    theirs: list[str],
    same: np.ndarray,
    student_ends: Sequence[int],
    teacher_ends: Sequence[int],
) -> dict[int, tuple[int, str]]:
    """Student ids that differ -> (the teacher's id of the same text or the same role, the reason)."""
    by_text = {text: i for i, text in enumerate(theirs) if text}
    found: dict[int, tuple[int, str]] = {}
    for i in np.flatnonzero(~same).tolist():
        if mine[i] and mine[i] in by_text:
            found[i] = by_text[mine[i]], "the same text"
    taken = {target for target, _ in found.values()} | set(np.flatnonzero(same).tolist())
    my_ends = [i for i in student_ends if i < len(mine) and not same[i] and i not in found]
    their_ends = [i for i in teacher_ends if i < len(theirs) and i not in taken]
    for i, target in zip(my_ends, their_ends, strict=False):
        found[i] = target, "both end a response"
    return found
