"""Tokenizers that share ordinary ids and differ in special ones, as Qwen2.5 and R1-Distill-Qwen do."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax import data
from opd_jax.errors import ModelError
from opd_jax.types import Ends

pytestmark = pytest.mark.short

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 ordinary ids
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>")
R1 = ("<end>", "<User>", "<Assistant>", "<tool>", "<begin>")
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
THINKING = "{% for m in messages %}<User>{{ m.content }}{% endfor %}<Assistant><think>\n"


def make(folder, special: tuple[str, ...], template: str = CHATML, letters=LETTERS):
    """A byte-level tokenizer of single letters with the given tokens added behind them."""
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template).save_pretrained(folder)
    return data.Tokenizer(str(folder))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make(tmp_path_factory.mktemp("qwen"), QWEN)


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    return make(tmp_path_factory.mktemp("r1"), R1, THINKING)


SETTINGS = {
    "student_ends": (258, 256), "teacher_ends": (256,), "student_rows": 300, "teacher_rows": 320,
}  # fmt: skip


def align(student, teacher, mode: str = "remap", **changes):
    given = SETTINGS | changes
    pair = [
        data.Vocabulary(model, given.pop(f"{role}_rows"), given.pop(f"{role}_ends"))
        for role, model in (("student", student), ("teacher", teacher))
    ]
    return data.align(*pair, special_tokens=mode, **given)


def lines_of(alignment, student, teacher, *, teacher_ends=(256,), rows=(300, 320)) -> list[str]:
    mine, theirs = (
        data.Vocabulary(model, count, ends)
        for model, count, ends in zip((student, teacher), rows, ((), teacher_ends), strict=True)
    )
    return data.alignment_report(alignment, mine, theirs)


@pytest.mark.parametrize("mode", ["remap", "mask", "keep"])
def test_equal_tokenizers_share_everything_but_the_padding(qwen, mode):
    got = align(qwen, qwen, mode, student_ends=(258,), teacher_ends=(258,))
    assert got.vocabulary == 260  # of 300 and 320 rows
    assert got.scored.all()
    assert got.drawn.all()
    assert got.stop_ids == (258,)
    assert got.ends.one_token
    assert got.head_rows is None
    assert not got.differing
    assert lines_of(got, qwen, qwen, teacher_ends=(258,)) == [
        "tokens: 260 of 260 ids scored by both models, of 300 and 320 rows",
        "  a response ends at <|im_end|> (258) for the student, <|im_end|> (258) for the teacher",
    ]


@pytest.mark.parametrize("mode", ["remap", "mask", "keep"])
def test_other_end_tokens_of_one_vocabulary_are_one_event(qwen, mode):
    """A base student that ends at <|endoftext|>, an instruct teacher that ends at <|im_end|>."""
    got = align(qwen, qwen, mode, student_ends=(256,), teacher_ends=(258,))
    assert got.ends == Ends(id=256, student=(256,), teacher=(258,), reference=(256,))
    assert got.stop_ids == (256,)
    assert np.flatnonzero(~got.scored).tolist() == [258]  # ends a response for the teacher alone
    assert np.flatnonzero(~got.drawn).tolist() == [258]
    assert lines_of(got, qwen, qwen, teacher_ends=(258,))[1:] == [
        "  a response ends at <|endoftext|> (256) for the student, <|im_end|> (258) for the teacher: "
        "scored as one event; <|im_end|> (258) ends it for another model alone: never drawn"
    ]


@pytest.mark.parametrize("student_ends", [(258, 256), (256, 258)])
def test_remap_scores_every_end_token_as_the_teachers_end(qwen, r1, student_ends):
    """In whatever order the folder names them: Qwen2.5-Math has <|endoftext|> before <|im_end|>."""
    got = align(qwen, r1, student_ends=student_ends, end=258)
    assert got.ends == Ends(id=258, student=student_ends, teacher=(256,), reference=student_ends)
    assert got.counted[[256, 258]].all()
    assert set(np.flatnonzero(~got.scored)) == {
        256,
        257,
    }  # 258 stands for both; <|im_start|>: no role
    assert set(np.flatnonzero(~got.drawn)) == {257}
    assert set(got.stop_ids) == {258, 256}
    assert (got.teacher_ids[:256] == np.arange(256)).all()
    assert got.teacher_ids[[256, 258]].tolist() == [256, 256]  # <end>
    assert got.teacher_ids[259] == 259  # <tool> is the same to both
    assert got.head_rows is None  # no copy of the teacher's output matrix
    report = "\n".join(lines_of(got, qwen, r1))
    assert "258 of 260 ids scored" in report
    assert "for the student, <end> (256) for the teacher: scored as one event" in report
    assert (
        "id 258: <|im_end|> to the student, <Assistant> to the teacher: ends a response" in report
    )
    assert "id 257: <|im_start|> to the student, <User> to the teacher: masked" in report
    assert "only one of them opens <think>" in report


def test_remap_follows_a_text_to_its_other_id(qwen, tmp_path):
    shuffled = make(tmp_path, ("<|im_end|>", "<|endoftext|>", "<tool>", "<|im_start|>"))
    got = align(qwen, shuffled, student_ends=(258,), teacher_ends=(256,))
    assert got.teacher_ids[256:].tolist() == [257, 259, 256, 258]
    assert got.scored.all()
    assert got.head_rows.tolist() == [*range(256), 257, 259, 256, 258, 256]  # its end comes last
    assert got.ends == Ends(id=258, student=(258,), teacher=(260,), reference=(258,))


def test_mask_scores_none_of_the_differing_ones_and_says_that_the_end_is_among_them(qwen, r1):
    got = align(qwen, r1, "mask")
    assert set(np.flatnonzero(~got.scored)) == {256, 257, 258}
    assert set(np.flatnonzero(~got.drawn)) == {257}
    assert got.head_rows is None
    assert got.stop_ids == (258, 256)
    assert got.ends is None
    assert not got.counted[[256, 258]].any()
    assert "no term but the golden solutions can teach" in "\n".join(lines_of(got, qwen, r1))


def test_mask_leaves_no_end_of_another_model_to_be_drawn(qwen, tmp_path):
    other = make(tmp_path, ("<eot>", "<|im_start|>", "<|im_end|>", "<tool>"))
    got = align(
        qwen, other, "mask", student_ends=(256,), teacher_ends=(258,), reference_ends=(259,)
    )
    assert got.ends is None  # <|endoftext|> is masked
    assert got.foreign_ends == (258, 259)
    assert np.flatnonzero(~got.drawn).tolist() == [258, 259]
    assert np.flatnonzero(~got.scored).tolist() == [256, 258, 259]


def test_mask_keeps_the_end_tokens_that_are_alike(qwen, tmp_path):
    other = make(tmp_path, ("<|endoftext|>", "<|im_start|>", "<eot>", "<tool>"))
    got = align(qwen, other, "mask", teacher_ends=(256, 258))
    assert got.ends == Ends(id=256, student=(256,), teacher=(256,), reference=(256,))
    assert np.flatnonzero(~got.scored).tolist() == [258]
    assert np.flatnonzero(~got.drawn).tolist() == []
    report = "\n".join(lines_of(got, qwen, other, teacher_ends=(256, 258)))
    assert "<|im_end|> (258) is masked" in report


def test_keep_compares_numbers(qwen, r1):
    got = align(qwen, r1, "keep")
    assert np.flatnonzero(~got.scored).tolist() == [256]  # 258 stands for it
    assert got.head_rows is None
    assert got.ends == Ends(id=258, student=(258, 256), teacher=(256,), reference=(258, 256))


def test_a_teacher_without_an_end_token_ends_where_the_student_does_or_is_refused(qwen, r1):
    assert align(qwen, qwen, teacher_ends=()).ends.teacher == (258, 256)
    with pytest.raises(ModelError, match=r"no eos_token_id .* wanted the teacher's end token"):
        align(qwen, r1, teacher_ends=())


def test_end_tokens_of_a_reference_count_for_it_alone(qwen):
    got = align(qwen, qwen, teacher_ends=(258,), student_ends=(258,), reference_ends=(256, 258))
    assert got.ends == Ends(id=258, student=(258,), teacher=(258,), reference=(256, 258))
    assert np.flatnonzero(~got.drawn).tolist() == [256]
    assert data.alone(260, (258,), reference_ends=(256,)).foreign_ends == (256,)


def test_an_id_that_the_teacher_has_elsewhere_is_not_missing(qwen, tmp_path):
    """<tool> is 259 to the student and 256 to the teacher, which ends at 258."""
    other = make(tmp_path, ("<tool>", "<|im_start|>", "<|im_end|>"))
    got = align(qwen, other, teacher_ends=(258,))
    assert got.teacher_ids[259] == 256
    assert got.missing == 0
    assert np.flatnonzero(~got.scored).tolist() == [256]  # 258 stands for it
    report = "\n".join(lines_of(got, qwen, other, teacher_ends=(258,), rows=(260, 259)))
    assert (
        "id 259: <tool> to the student, nothing to the teacher: remapped to <tool> (256)" in report
    )


def test_a_closed_thinking_block_is_not_an_open_one(qwen, tmp_path):
    closed = make(tmp_path, QWEN, CHATML + "<think>\n\n</think>")
    got = align(qwen, closed, teacher_ends=(258,))
    assert len(lines_of(got, qwen, closed, teacher_ends=(258,), rows=(260, 260))) == 2


def test_ids_that_the_teacher_lacks_are_masked(qwen, tmp_path):
    smaller = make(tmp_path, QWEN[:3])
    got = align(qwen, smaller, student_ends=(258,), teacher_ends=(258,))
    assert np.flatnonzero(~got.scored).tolist() == [259]
    assert got.missing == 1
    assert "1 ids of the student are unknown to the teacher" in "\n".join(
        lines_of(got, qwen, smaller, teacher_ends=(258,), rows=(260, 259))
    )


def test_other_ordinary_ids_are_refused(qwen, tmp_path):
    swapped = [LETTERS[1], LETTERS[0], *LETTERS[2:]]
    other = make(tmp_path, QWEN, letters=swapped)
    with pytest.raises(ModelError, match=r"read 2 ordinary ids differently \(id 0 is") as error:
        align(qwen, other)
    assert "one tokenizer family" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_teacher_every_id_counts():
    got = data.alone(7, (3,))
    assert got.scored.all()
    assert got.stop_ids == (3,)
    assert (got.vocabulary, got.head_rows) == (7, None)


def test_without_a_teacher_several_end_tokens_are_one_event():
    got = data.alone(7, (3, 5, 9), end=5)
    assert got.ends == Ends(id=5, student=(3, 5), reference=(3, 5))
    assert np.flatnonzero(~got.scored).tolist() == [3]
    assert got.drawn.all()
