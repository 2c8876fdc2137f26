"""Two tokenizers side by side: which ids mean the same, and what becomes of those that do not.

Student and teacher share the ids of a response, so an id must mean the same text to both. Models of
one family agree on ordinary ids and may differ in special ones: 151645 ends a turn for Qwen2.5 and
opens one for R1-Distill-Qwen. Log-probs of both models are taken over the ids that are *scored*;
the others, and the padding rows of either model's output matrix, carry no mass. The end of a response
is an event and not an id: each model has its own set of end tokens, and each set counts as one event.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.data import template_boundary
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import ModelError
from opd_jax.types import Ends

SPECIAL_TOKENS = (
    "remap",
    "mask",
    "keep",
)  # what may be done with special ids that have two meanings
COMPARISONS = ("auto", "ids", "spans")  # how the log-probs of student and teacher are compared


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids of one model.

    Attributes:
      tokenizer: what they mean.
      rows: rows of the model's output matrix; there may be more than tokens.
      ends: end tokens, as the model's folder names them.
    """

    tokenizer: Tokenizer
    rows: int
    ends: Sequence[int]


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
      scored: bool [vocabulary], ids over which log-probs are normalised; `ends.id` stands for all end
        tokens, so the others are not among them.
      drawn: bool [vocabulary], ids a rollout may hold: the scored ones and the student's end tokens.
      stop_ids: the student's end tokens.
      ends: the end tokens of every model, counted as one event; None where that event is not scored.
      foreign_ends: ids at which the teacher or the reference ends a response and the student does not.
      head_rows: int32, rows of the teacher's output matrix in the order in which it scores: its ids for
        the student's, then its end tokens; None where its own order will do.
      differing: special ids with two meanings.
      missing: how many of the student's ids the teacher does not have.
      teacher: the ids of a teacher with another tokenizer, which is compared by spans of text (spans.py);
        None where the two share ids. With it, `teacher_ids`, `head_rows` and `ends.teacher` are not used.
      shared: int32 [2, X], pairs of the student's and that teacher's scored ids of one text; None without.
    """

    vocabulary: int
    teacher_ids: np.ndarray
    scored: np.ndarray
    drawn: np.ndarray
    stop_ids: tuple[int, ...]
    ends: Ends | None
    foreign_ends: tuple[int, ...] = ()
    head_rows: np.ndarray | None = None
    differing: tuple[Differing, ...] = ()
    missing: int = 0
    teacher: "Alignment | None" = None
    shared: np.ndarray | None = None

    @property
    def counted(self) -> np.ndarray:
        """Ids that have a log-prob: the scored ones and, where the end is scored, every end token."""
        counted = self.scored.copy()
        if self.ends is not None:
            counted[list(self.ends.student)] = True
        return counted


def alone(
    vocabulary: int,
    stop_ids: Sequence[int],
    *,
    end: int | None = None,
    reference_ends: Sequence[int] = (),
) -> Alignment:
    """The alignment of a run in which no other tokenizer takes part: every id counts.

    `end` is the end token of golden solutions (None: the first of `stop_ids`); `reference_ends` are
    those of a reference with a folder of its own.
    """
    ids = np.arange(vocabulary, dtype=np.int32)
    stops = _known(stop_ids, vocabulary)
    scored, ends = np.ones(vocabulary, bool), None
    foreign: tuple[int, ...] = ()
    if stops:
        theirs = _known(reference_ends, vocabulary) or stops
        ends = Ends(stops[0] if end is None else end, stops, reference=theirs)
        foreign = tuple(i for i in theirs if i not in stops)
        scored[[*stops, *foreign]] = False
        scored[ends.id] = True
    return Alignment(vocabulary, ids, scored, _drawn(scored, stops), stops, ends, foreign)


def align(
    student: Vocabulary,
    teacher: Vocabulary,
    *,
    special_tokens: str,
    end: int | None = None,
    reference_ends: Sequence[int] = (),
) -> Alignment:
    """Compare two vocabularies id by id.

    `reference_ends` are the end tokens of the reference (() for those of the student); `end` is the
    end token of golden solutions (None: the student's first). `special_tokens` says what becomes of
    special ids with two meanings: "remap" gives the student's token the teacher's id of the same text
    and masks those without one; "mask" masks them all, end tokens too; "keep" compares numbers. An id
    at which the teacher or the reference ends a response and the student does not is never drawn and
    never scored.

    Raises ModelError where ordinary ids differ (the two models do not share a vocabulary), and where
    the teacher has no end token, so that no end of the student's could be scored.
    """
    mine, theirs = _texts(student), _texts(teacher)
    vocabulary = len(mine)
    ids = np.arange(vocabulary, dtype=np.int32)
    known = len(theirs)
    theirs += [""] * (vocabulary - known)
    both = np.array([bool(mine[i] and theirs[i]) for i in range(vocabulary)])
    same = both & np.array([mine[i] == theirs[i] for i in range(vocabulary)])
    _require_ordinary_ids(student.tokenizer, teacher.tokenizer, mine, theirs, both & ~same)
    scored = both.copy() if special_tokens == "keep" else same.copy()
    treatment: dict[int, str] = {}
    if special_tokens != "keep":
        treatment = dict.fromkeys(np.flatnonzero(~same).tolist(), "masked")
    if special_tokens == "remap":
        for i, target in _same_text(mine, theirs, same).items():
            ids[i], scored[i] = target, True
            treatment[i] = f"remapped to {theirs[target]} ({target}): the same text"
    renumbered = bool((ids != np.arange(vocabulary))[scored].any())

    stops = _known(student.ends, vocabulary)
    own, others = stops, _known(teacher.ends, known)
    if not others:  # its config names none: what it writes as the student does ends for it too
        others = tuple(int(ids[i]) for i in own if scored[i])
    if special_tokens == "mask":  # ends with two meanings are masked like any other
        own = tuple(i for i in own if same[i])
        others = tuple(j for j in others if j < vocabulary and same[j])
    elif own and not others:
        raise no_end(teacher.tokenizer)
    ends = None
    read_as_end = np.isin(ids, _known(teacher.ends, known)) & scored
    foreign = _known([*np.flatnonzero(read_as_end).tolist(), *reference_ends], vocabulary)
    foreign = tuple(i for i in foreign if i not in stops)
    scored[[*stops, *foreign]] = False
    if own and others:
        ends = Ends(
            id=end if end is not None and end in own else own[0],
            student=own,
            teacher=tuple(range(vocabulary, vocabulary + len(others))) if renumbered else others,
            reference=_known(reference_ends, vocabulary) or own,
        )
        scored[ends.id] = True
        for i in own:
            treatment[i] = "ends a response for the student"
            ids[i] = ids[i] if int(ids[i]) in others else others[0]
    ids = np.minimum(ids, known - 1)  # those beyond what the teacher knows are not scored
    head_rows = None
    if renumbered:
        head_rows = np.concatenate([ids, others]).astype(np.int32)
    elif teacher.rows < vocabulary:
        head_rows = ids
    differing = tuple(
        Differing(i, mine[i], theirs[i] or "nothing", what)
        for i, what in sorted(treatment.items())
        if mine[i] and mine[i] != theirs[i] and (both[i] or scored[i])
    )
    missing = sum(
        bool(mine[i] and not theirs[i] and not scored[i] and i not in own)
        for i in range(vocabulary)
    )
    return Alignment(
        vocabulary, ids, scored, _drawn(scored, stops), stops, ends, foreign,
        head_rows, differing, missing,
    )  # fmt: skip


def no_end(teacher: Tokenizer) -> ModelError:
    """Return the error for a teacher without an end token."""
    return ModelError(
        f"{teacher.path}: no eos_token_id in config.json or generation_config.json, and no "
        "chat template that closes a turn, wanted the teacher's end token, by which the end of the "
        "student's responses is scored; add it to generation_config.json"
    )


def report(
    alignment: Alignment,
    student: Vocabulary,
    teacher: Vocabulary,
) -> list[str]:
    """Lines for the start of a run: shared ids, padding, end tokens, and ids with two meanings."""
    rows = student.rows, teacher.rows
    padding = "" if rows == (alignment.vocabulary,) * 2 else f", of {rows[0]} and {rows[1]} rows"
    lines = [
        f"tokens: {int(alignment.scored.sum()):,} of {alignment.vocabulary:,} ids scored by both "
        f"models{padding}",
        "  " + ends_line(alignment, student.tokenizer, teacher.tokenizer, teacher.ends),
    ]
    if alignment.missing:
        lines.append(f"  {alignment.missing} ids of the student are unknown to the teacher: masked")
    lines += [
        f"  id {d.id}: {d.student} to the student, {d.teacher} to the teacher: {d.treatment}"
        for d in alignment.differing
    ]
    return lines + boundary_notes(student.tokenizer, teacher.tokenizer)


def ends_line(
    alignment: Alignment,
    student: Tokenizer,
    teacher: Tokenizer | None = None,
    teacher_ends: Sequence[int] = (),
) -> str:
    """What ends a response for each model, and how the end is scored.

    A reference is named where it has end tokens of its own.
    """
    mine = named(student, alignment.stop_ids)
    if alignment.ends is None:
        return (
            f"note: a response ends at {mine}, which scoring.special_tokens=mask leaves out: no term "
            "but the golden solutions can teach the student to end; set "
            "--config.scoring.special_tokens=remap"
        )
    line = f"a response ends at {mine}"
    if teacher is not None:
        line += f" for the student, {named(teacher, teacher_ends)} for the teacher"
    reference = alignment.ends.reference
    if reference not in ((), alignment.stop_ids, alignment.ends.student):
        line += f", {named(student, reference)} for the reference"
    others = {tuple(teacher_ends), reference} - {(), alignment.stop_ids}
    if len(alignment.stop_ids) > 1 or others:
        line += ": scored as one event"
    left = [i for i in alignment.stop_ids if i not in alignment.ends.student]
    if left:
        line += f"; {named(student, left)} is masked (scoring.special_tokens=mask)"
    if alignment.foreign_ends:
        line += f"; {named(student, alignment.foreign_ends)} ends it for another model alone: never drawn"
    return line


def named(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Tokens by text and id: `<|im_end|> (151645) or <|endoftext|> (151643)`."""
    texts = tokenizer.hf.convert_ids_to_tokens(list(ids))
    return " or ".join(f"{text} ({i})" for text, i in zip(texts, ids, strict=True))


def boundary_notes(student: Tokenizer, teacher: Tokenizer) -> list[str]:
    """How the two prompts end, where one of them opens the thinking and the other leaves it to do."""
    ends = [t.render("?").rpartition("?")[2] for t in (student, teacher)]
    opens = [template_boundary.opening(end, closed=False) for end in ends]
    if bool(opens[0]) == bool(opens[1]):
        return []
    return [
        f"  the student's prompt ends {ends[0]!r}, the teacher's {ends[1]!r}: only one of them opens "
        f"{max(opens).strip()}, so the other's first tokens are penalised for it; give both the same "
        "kind of template (--config.student.chat_template, --config.teacher.chat_template) or mask "
        "the pieces where they first occur (--config.scoring.mask_first)"
    ]


def _known(ids: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """Those of the ids that a vocabulary has, each once."""
    return tuple(i for i in dict.fromkeys(ids) if i < vocabulary)


def _drawn(scored: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Ids that a rollout may hold: scored ones, and end tokens, scored or not."""
    drawn = scored.copy()
    drawn[list(stops)] = True
    return drawn


def _texts(of: Vocabulary) -> list[str]:
    """Token strings by id, empty where there is none; ids beyond the output matrix do not exist."""
    texts = [""] * min(of.tokenizer.size, of.rows)
    for text, i in of.tokenizer.vocabulary().items():
        if i < len(texts):
            texts[i] = text
    return texts


def share_ids(student: Vocabulary, teacher: Vocabulary) -> bool:
    """Return whether every ordinary id that both vocabularies have is the same token to both."""
    mine, theirs = _texts(student), _texts(teacher)
    both = zip(mine, theirs, strict=False)
    differ = np.array([bool(a and b and a != b) for a, b in both], bool)
    return not _ordinary(student.tokenizer, teacher.tokenizer, differ)


def _ordinary(student: Tokenizer, teacher: Tokenizer, differ: np.ndarray) -> list[int]:
    special = student.added() | teacher.added()
    return [i for i in np.flatnonzero(differ).tolist() if i not in special]


def _require_ordinary_ids(
    student: Tokenizer, teacher: Tokenizer, mine: list[str], theirs: list[str], differ: np.ndarray
) -> None:
    if ordinary := _ordinary(student, teacher, differ):
        i = ordinary[0]
        raise ModelError(
            f"the tokenizers of {student.path} and {teacher.path} read {len(ordinary)} ordinary ids "
            f"differently (id {i} is {mine[i]!r} and {theirs[i]!r}), wanted one vocabulary; use a student "
            "and a teacher of one tokenizer family, or compare spans of text: "
            "--config.scoring.compare=spans"
        )


def _same_text(mine: list[str], theirs: list[str], same: np.ndarray) -> dict[int, int]:
    """The student's ids that differ -> the teacher's id of the same text, where there is one."""
    by_text = {text: i for i, text in enumerate(theirs) if text}
    return {
        i: by_text[mine[i]]
        for i in np.flatnonzero(~same).tolist()
        if mine[i] and mine[i] in by_text
    }
