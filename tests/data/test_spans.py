"""Spans of text by hand, and responses as a teacher with another tokenizer reads them."""

import numpy as np
import pytest

from opd_jax import data
from opd_jax.data.spans import spans
from opd_jax.errors import ModelError
from tests.support.tokenizers import byte_level, merged, sentencepiece

pytestmark = pytest.mark.short

END = "<|im_end|>"


def reader(
    student: data.Tokenizer,
    teacher: data.Tokenizer,
    mine: str = END,
    theirs: tuple[str, ...] = (END,),
) -> tuple:
    """The alignment of two tokenizers and how the teacher reads; with the end tokens of both."""
    ends = ids(student, mine), ids(teacher, *theirs)
    pair = [
        data.Vocabulary(one, one.size, own)
        for one, own in zip((student, teacher), ends, strict=True)
    ]
    return data.align_text(*pair)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    student = merged(tmp_path_factory.mktemp("student"), ("a+b", "c+d", "Ġ+ab"))
    teacher = merged(tmp_path_factory.mktemp("teacher"), ("a+b", "ab+c"), turn=7)
    return student, teacher


def ids(tokenizer: data.Tokenizer, *texts: str) -> list[int]:
    """Ids of tokens by their strings."""
    return [tokenizer.vocabulary()[text] for text in texts]


@pytest.mark.parametrize(
    ("student", "teacher", "want"),
    [
        ((1, 3, 4), (3, 4), ((0, 0, 1), (0, 1))),  # CITING 11
        ((2, 4), (1, 2, 3, 4), ((0, 1), (0, 0, 1, 1))),
        ((2, 5), (3, 5), ((0, 0), (0, 0))),  # crossing tokens: one span
        ((1, 2), (1, 2), ((0, 1), (0, 1))),
        ((1, 3), (1, 2), ((0, -1), (0, -1))),  # nothing in common behind byte 1
        ((1, 1, 2), (1, 2), ((0, 0, 1), (0, 1))),  # a token without bytes
        ((), (), ((), ())),
    ],
)
def test_spans_by_hand(student, teacher, want):
    got = spans(np.array(student, int), np.array(teacher, int))
    assert [span.tolist() for span in got] == [list(span) for span in want]


def test_a_response_in_the_tokens_of_both(pair):
    """abcd is ab cd to the student and abc d to the teacher; the end is a span of its own."""
    student, teacher = pair
    _, read = reader(*pair)
    (got,) = read.read([ids(student, "ab", "cd", "x", END)])
    assert got.ids == ids(teacher, "abc", "d", "x", END)
    assert got.student_span.tolist() == [0, 0, 1, 2]
    assert got.teacher_span.tolist() == [0, 0, 1, 2]
    assert got.length.tolist() == [2, 2, 1, 0]
    assert got.single == (2, 4)


def test_the_end_alone_and_nothing_at_all(pair):
    student, teacher = pair
    _, read = reader(*pair)
    end, nothing = read.read([ids(student, END), []])
    assert (end.ids, end.student_span.tolist()) == (ids(teacher, END), [0])
    assert (nothing.ids, nothing.student_span.tolist()) == ([], [])


def test_a_character_split_over_tokens(pair):
    """é is two bytes: two tokens of the student and, merged, one of the teacher's."""
    _, read = reader(*pair)
    (got,) = read.read([ids(pair[0], "Ã", "©", END)])
    assert got.ids == ids(pair[1], "Ã", "©", END)
    assert got.student_span.tolist() == [0, 1, 2]


def test_a_merged_character(tmp_path, pair):
    whole = merged(tmp_path, ("Ã+©",))
    _, read = reader(pair[0], whole)
    (got,) = read.read([ids(pair[0], "x", "Ã", "©", END)])
    assert got.ids == ids(whole, "x", "Ã©", END)
    assert got.student_span.tolist() == [0, 1, 1, 2]


def test_a_cut_response_leaves_out_what_the_cut_decides(pair):
    """Cut behind "ab": a "c" that would have followed makes the teacher's last token another."""
    student, teacher = pair
    _, read = reader(*pair)
    for texts, theirs, want in (
        (("x", "ab"), ("x", "ab"), [0, -1]),
        (
            ("x", "Ã"),
            ("x",),
            [-1, -1],
        ),  # half a character: "x" is then the last token of the teacher's
        (("x", "y", "Ã"), ("x", "y"), [0, -1, -1]),
        (("Ã",), (), [-1]),
    ):
        (got,) = read.read([ids(student, *texts)])
        assert got.ids == ids(teacher, *theirs)
        assert got.student_span.tolist() == want


def test_a_cut_within_a_span(pair):
    """ab c of abcd: the student has ended a token where the teacher's goes on."""
    student, teacher = pair
    _, read = reader(*pair)
    (got,) = read.read([ids(student, "x", "ab", "c")])
    assert got.ids == ids(teacher, "x", "abc")
    assert got.student_span.tolist() == [0, -1, -1]


def test_more_tokens_than_the_teachers_rows_hold(pair):
    student, teacher = pair
    _, read = reader(*pair)
    (got,) = read.read([ids(student, "ab", "cd", "x", END)], limit=3)
    assert got.ids == ids(teacher, "abc", "d", "x")
    assert got.student_span.tolist() == [0, 0, 1, -1]
    (got,) = read.read([ids(student, "ab", "cd", "x", END)], limit=1)
    assert got.student_span.tolist() == [-1] * 4


def test_bytes_of_no_character_are_read_one_by_one(pair):
    student, teacher = pair
    _, read = reader(*pair)
    (got,) = read.read([ids(student, "ÿ", "a", "©", "b", END)])
    assert got.ids == ids(teacher, "ÿ", "a", "©", "b", END)
    assert got.student_span.tolist() == [0, 1, 2, 3, 4]


def test_text_that_looks_like_a_special_token_is_text(pair):
    student, _ = pair
    _, read = reader(*pair)
    row = student.encode_text([END])[0]
    assert len(row) == len(END)
    (got,) = read.read([[*row, *ids(student, END)]])
    assert len(got.ids) == len(END) + 1
    assert got.student_span.tolist() == list(range(len(END) + 1))


def test_special_tokens_of_one_model_are_neither_sampled_nor_scored(tmp_path):
    student = merged(tmp_path / "s", ("a+b",), special=("<tool>", "<own>", "<|stop|>", END))
    teacher = merged(
        tmp_path / "t", ("b+c",), special=("<more>", "<|stop|>", "<tool>", END), turn=3
    )
    got, read = reader(student, teacher, theirs=(END, "<|stop|>"))
    assert got.teacher is not None
    assert not got.drawn[ids(student, "<own>", "<|stop|>")].any()  # the teacher would end there
    assert got.drawn[ids(student, "<tool>", END)].all()
    assert not got.teacher.scored[ids(teacher, "<more>")].any()
    assert got.teacher.scored[ids(teacher, "<tool>")].all()
    assert got.foreign_ends == tuple(ids(student, "<|stop|>"))
    assert set(got.teacher.ends.student) == set(ids(teacher, END, "<|stop|>"))
    (row,) = read.read([ids(student, "ab", "<tool>", "ab", END)])
    assert row.ids == ids(teacher, "a", "b", "<tool>", "a", "b", END)
    assert row.student_span.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
def test_sentencepiece_reads_the_rest_of_a_text(tmp_path, pair, kind):
    """No space before a text that goes on, in either direction; é falls back to bytes."""
    other = sentencepiece(tmp_path, None, kind=kind)
    _, read = reader(pair[0], other, theirs=("</s>",))
    student = pair[0]
    (got,) = read.read([[*student.encode("so é 2\n"), *ids(student, END)]])
    assert got.ids == ids(other, "so", "▁", "<0xC3>", "<0xA9>", "▁2", "<0x0A>", "</s>")
    assert got.student_span.tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6]
    _, read = reader(other, pair[0], mine="</s>")
    (got,) = read.read([ids(other, "▁so", "<0xC3>", "<0xA9>", "</s>")])
    assert got.ids == ids(student, "Ġ", "s", "o", "Ã", "©", END)
    assert got.student_span.tolist() == [0, 1, 2, 3]


def test_a_tokenizer_that_loses_bytes_is_refused(tmp_path, pair):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<unk>").save_pretrained(tmp_path)
    words = data.Tokenizer(str(tmp_path))
    with pytest.raises(
        ModelError, match=r"WordLevel tokenizer without byte-level .* one tokenizer family$"
    ):
        reader(pair[0], words, theirs=("<unk>",))


def test_a_tokenizer_that_changes_letters_is_refused(tmp_path, pair):
    from tokenizers import normalizers

    lower = byte_level(tmp_path, None)
    lower.hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        ModelError, match=r"changes the text that it reads, wanted one that keeps every byte"
    ):
        reader(pair[0], lower)


def test_a_response_that_the_teacher_would_change_is_not_compared(tmp_path, pair):
    """NFC joins e and a combining accent: other bytes. Other responses are as they were."""
    from tokenizers import normalizers

    composed = byte_level(tmp_path, None)
    composed.hf.backend_tokenizer.normalizer = normalizers.NFC()
    student = pair[0]
    _, read = reader(student, composed)
    rows = [[*student.encode_text([text])[0], *ids(student, END)] for text in ("e\u0301", "é")]
    changed, kept = read.read(rows)
    assert (changed.ids, set(changed.student_span.tolist())) == ([], {-1})
    assert kept.student_span.tolist() == [0, 1, 2]


def test_the_report_counts_spans_of_one(pair):
    end = {id(one): [one.vocabulary()[END]] for one in pair}
    both = [data.Vocabulary(one, one.size, end[id(one)]) for one in pair]
    alignment, read = data.align_text(*both)
    lines = data.spans_report(alignment, read, *both, ["abcd", "xab"], source="2 texts")
    # ab cd end | x ab end, of which all but ab cd are spans of one; abc d end | x ab end
    assert "66.7% of the student's tokens" in lines[1]
    assert "has 1.00 tokens for each" in lines[1]
