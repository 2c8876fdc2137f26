"""Spans: the smallest pieces of a response in which two tokenizations end at the same byte.

A teacher with another tokenizer reads the text of a response in tokens of its own. Where both end a token at
the same byte, both have a log-prob of the same piece of text: the sum over its tokens (the chain rule).
"""

import codecs
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from opd_jax.data.spelling import Spelling
from opd_jax.data.vocabulary import Alignment, Vocabulary, alone, boundary_notes, ends_line, no_end


def spans(student_ends: np.ndarray, teacher_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the span of each token of two tokenizations of one text; int32 [n] and [m].

    `student_ends` [n], `teacher_ends` [m]: bytes of the text up to the end of each token, not decreasing. A
    span ends where both end a token. Spans count from 0; tokens behind the last common end have -1. A
    token without bytes belongs to the span in which it ends. (`align_bytes` of GOLD in TRL 1.16 and SimCT,
    2605.07711, cut so as well.)
    """
    common = np.intersect1d(student_ends, teacher_ends)

    def of(ends: np.ndarray) -> np.ndarray:
        place = np.searchsorted(common, ends)
        return np.where(place < len(common), place, -1).astype(np.int32)

    return of(student_ends), of(teacher_ends)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A response as the teacher reads it.

    Attributes:
      ids: the teacher's tokens, the end of the response included.
      student_span, teacher_span: int32, the span of each token of the student and of `ids`; -1 for tokens
        that cannot be compared.
      length: int64, bytes of each of the student's tokens; 0 for the end of the response.
    """

    ids: list[int]
    student_span: np.ndarray
    teacher_span: np.ndarray
    length: np.ndarray

    @property
    def single(self) -> tuple[int, int]:
        """Tokens of the student that are a span of one token to both models, and all of its tokens."""
        mine, theirs = (span[span >= 0] for span in (self.student_span, self.teacher_span))
        size = int(max(mine, default=-1)) + 1
        both = [np.bincount(span, minlength=size) == 1 for span in (mine, theirs)]
        return int(np.sum(both[0] & both[1])), len(self.student_span)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a teacher with another tokenizer reads the student's responses.

    Attributes:
      student, teacher: bytes of their tokens.
      ends: the student's end tokens. end: the teacher's token that stands for the end.
      added: the student's added tokens -> the teacher's of the same text.
    """

    student: Spelling
    teacher: Spelling
    ends: Collection[int]
    end: int
    added: Mapping[int, int]

    def read(
        self, responses: Sequence[Sequence[int]], *, limit: int | None = None
    ) -> list[Reading]:
        """Return the readings of responses, of at most `limit` tokens of the teacher each.

        A response without an end token was cut: what would have followed decides the teacher's last
        token, so the span in which it lies is not compared, and neither is half a character. Nothing of a
        response is compared whose bytes the teacher's tokenizer cannot write.
        """
        split = [self._parts(response) for response in responses]
        texts = [part for parts in split for part in parts if isinstance(part, bytes)]
        encoded = iter(self.teacher.encode(texts))
        out = []
        for response, parts in zip(responses, split, strict=True):
            ids: list[int] = []
            sizes: list[int] = []
            lost = False
            for part in parts:
                if isinstance(part, bytes):
                    found = next(encoded)
                    lost |= found is None
                    ids += found or []
                    sizes += self.teacher.lengths(found or []).tolist()
                else:
                    ids.append(self.added.get(part, self.end))
                    sizes.append(1)
            ids = [] if lost else ids[:limit]
            out.append(self._reading(response, ids, np.cumsum(sizes[: len(ids)], dtype=int)))
        return out

    def _parts(self, response: Sequence[int]) -> list[bytes | int]:
        """Cut a response into runs of text and, between them, tokens that stand for themselves."""
        parts: list[bytes | int] = []
        run = b""
        for i in response:
            piece = self._piece(i)
            if piece is None:
                parts += [run, i] if run else [i]
                run = b""
            else:
                run += piece
        if run:  # no end token: half a character may be at its end
            decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            decoder.decode(run)
            run = run[: len(run) - len(decoder.getstate()[0])]
        return [*parts, run] if run else parts

    def _piece(self, i: int) -> bytes | None:
        """Return the text of a token; None where it stands for itself: an end, or an added token of both."""
        if i in self.ends or i in self.added:
            return None
        return (self.student.pieces[i] if i < len(self.student.pieces) else None) or b""

    def _reading(
        self, response: Sequence[int], ids: list[int], teacher_ends: np.ndarray
    ) -> Reading:
        pieces = [self._piece(i) for i in response]
        length = np.array([len(piece or b"") for piece in pieces], dtype=int)
        # A token that stands for itself moves both texts on by one.
        ends = np.cumsum([1 if piece is None else len(piece) for piece in pieces], dtype=int)
        mine, theirs = spans(ends, teacher_ends)
        ended = bool(pieces) and response[-1] in self.ends
        if not ended and ids and theirs[-1] >= 0:
            mine, theirs = (np.where(span == theirs[-1], -1, span) for span in (mine, theirs))
        return Reading(ids, mine.astype(np.int32), theirs.astype(np.int32), length)


def align_text(
    student: Vocabulary,
    teacher: Vocabulary,
    *,
    end: int | None = None,
    reference_ends: Sequence[int] = (),
) -> tuple[Alignment, Reader]:
    """Compare two vocabularies by the bytes of their tokens; arguments as `vocabulary.align` has them.

    Each model is scored over the tokens of its own that the other can write: all that spell bytes, added
    tokens that both have, and the end of the response. Special tokens that only one has carry no mass.

    Raises ModelError where the bytes of a tokenizer are not known, and for a teacher without an end token.
    """
    spellings = Spelling(student.tokenizer), Spelling(teacher.tokenizer)
    sizes = [min(of.tokenizer.size, of.rows) for of in (student, teacher)]
    mine = alone(sizes[0], student.ends, end=end, reference_ends=reference_ends)
    theirs = alone(sizes[1], teacher.ends)
    if theirs.ends is None:
        raise no_end(teacher.tokenizer)
    names = {i: text for text, i in spellings[1].added.items() if i < sizes[1]}
    ids = {text: i for i, text in names.items()}
    added = {i: ids[text] for text, i in spellings[0].added.items() if text in ids and i < sizes[0]}
    foreign = tuple(i for i, j in added.items() if j in theirs.stop_ids and i not in mine.stop_ids)
    left_out = {*mine.stop_ids, *mine.foreign_ends, *foreign}
    added = {i: j for i, j in added.items() if i not in left_out and j not in theirs.stop_ids}
    mine = _over(mine, spellings[0], added.keys(), [*mine.foreign_ends, *foreign])
    theirs = _over(theirs, spellings[1], added.values(), [])
    assert theirs.ends is not None
    mine = dataclasses.replace(
        mine,
        teacher_ids=np.full(sizes[0], -1, np.int32),
        teacher=theirs,
        shared=_shared(mine, theirs, *spellings, added),
    )
    return mine, Reader(*spellings, frozenset(mine.stop_ids), theirs.ends.id, added)


def _over(
    alignment: Alignment, spelling: Spelling, added: Iterable[int], foreign: Sequence[int]
) -> Alignment:
    """Return the alignment over ids that spell bytes, the given added ones, and the end."""
    scored = np.array([piece is not None for piece in spelling.pieces[: alignment.vocabulary]])
    scored[list(added)] = True
    scored[[*alignment.stop_ids, *foreign]] = False
    if alignment.ends is not None:
        scored[alignment.ends.id] = True
    drawn = scored.copy()
    drawn[list(alignment.stop_ids)] = True
    return dataclasses.replace(
        alignment, scored=scored, drawn=drawn, foreign_ends=tuple(dict.fromkeys(foreign))
    )


def _shared(
    student: Alignment,
    teacher: Alignment,
    student_spelling: Spelling,
    teacher_spelling: Spelling,
    added: Mapping[int, int],
) -> np.ndarray:
    """Return pairs of scored ids of one text, by the student's ids; int32 [2, X].

    The end of a response is one such pair, and so is an added token of both. Of several ids with the same
    bytes (SentencePiece's letters and single bytes) the first ones are a pair, then the second ones.
    """
    pairs = dict(added)
    if student.ends is not None and teacher.ends is not None:
        pairs[student.ends.id] = teacher.ends.id
    taken = set(pairs.values())
    by_bytes: dict[bytes, list[int]] = {}
    for i in reversed(np.flatnonzero(teacher.scored).tolist()):
        if i not in taken and (piece := teacher_spelling.pieces[i]):
            by_bytes.setdefault(piece, []).append(i)
    for i in np.flatnonzero(student.scored).tolist():
        if i not in pairs and (piece := student_spelling.pieces[i]) and by_bytes.get(piece):
            pairs[i] = by_bytes[piece].pop()
    return np.array(sorted(pairs.items()), np.int32).reshape(-1, 2).T


def report(
    alignment: Alignment,
    reader: Reader,
    student: Vocabulary,
    teacher: Vocabulary,
    texts: Sequence[str],
    *,
    source: str,
) -> list[str]:
    """Lines for the start of a run: how many tokens of these texts stand in spans of one.

    `source` names the texts.
    """
    assert alignment.teacher is not None
    rows = reader.student.tokenizer.encode_text(list(texts))
    readings = reader.read([[*row, alignment.stop_ids[0]] for row in rows])
    single, tokens = np.sum([reading.single for reading in readings], axis=0)
    theirs = sum(len(reading.ids) for reading in readings)
    lost = sum(not reading.ids for reading in readings)
    lines = [
        "tokens: compared by spans of text, because student and teacher have tokenizers of "
        f"{alignment.vocabulary:,} and {alignment.teacher.vocabulary:,} ids (docs/spans.md)",
        f"  {source}: {single / tokens:.1%} of the student's tokens stand in spans of one token of both; the "
        f"teacher has {theirs / tokens:.2f} tokens for each of the student's",
    ]
    if lost:
        lines.append(
            f"  {lost} of these {len(texts)} texts hold bytes that the teacher's tokenizer changes: such "
            "responses are not scored"
        )
    lines.append("  " + ends_line(alignment, student.tokenizer, teacher.tokenizer, teacher.ends))
    return lines + boundary_notes(student.tokenizer, teacher.tokenizer)
