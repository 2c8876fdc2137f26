"""Tokenizers that share ordinary ids and differ in special ones, as Qwen2.5 and R1-Distill-Qwen do."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax import data
from opd_jax.errors import ModelError

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


def align(student, teacher, mode: str = "remap", **changes):
    settings = {
        "student_ends": (258, 256), "teacher_ends": (256,), "student_rows": 300, "teacher_rows": 320,
    }  # fmt: skip
    return data.align(student, teacher, special_tokens=mode, **settings | changes)


@pytest.mark.parametrize("mode", ["remap", "mask", "keep"])
def test_equal_tokenizers_share_everything_but_the_padding(qwen, mode):
    got = align(qwen, qwen, mode, teacher_ends=(258,))
    assert got.vocabulary == 260  # of 300 and 320 rows
    assert got.scored.all()
    assert got.drawn.all()
    assert got.stop_ids == (258, 256)
    assert not got.renumbered
    assert not got.differing
    lines = data.alignment_report(got, qwen, qwen, rows=(300, 320))
    assert lines == [
        "tokens: 260 of 260 ids scored by both models, of 300 and 320 rows; "
        "a response ends at <|im_end|> (258), <|endoftext|> (256)"
    ]


def test_end_tokens_of_both_stop_a_response(qwen):
    got = align(qwen, qwen, student_ends=(256,), teacher_ends=(258, 256))
    assert set(got.stop_ids) == {256, 258}


def test_remap_gives_an_end_token_the_teachers_and_masks_the_rest(qwen, r1):
    got = align(qwen, r1)
    assert got.teacher_ids[258] == 256  # <|im_end|>, the student's first end token -> <end>
    assert got.renumbered
    unscored = {256, 257}  # <|endoftext|>: the teacher has one end token; <|im_start|>: no role
    assert set(np.flatnonzero(~got.scored)) == unscored
    assert set(np.flatnonzero(~got.drawn)) == {257}  # an end token may be drawn, scored or not
    assert got.stop_ids == (258, 256)
    assert (got.teacher_ids[:256] == np.arange(256)).all()
    assert got.teacher_ids[259] == 259  # <tool> is the same to both
    report = "\n".join(data.alignment_report(got, qwen, r1, rows=(300, 320)))
    assert "258 of 260 ids scored" in report
    assert (
        "id 258: <|im_end|> to the student, <Assistant> to the teacher: remapped to <end>" in report
    )
    assert "id 257: <|im_start|> to the student, <User> to the teacher: masked" in report
    assert "only one of them opens <think>" in report


def test_remap_follows_a_text_to_its_other_id(qwen, tmp_path):
    shuffled = make(tmp_path, ("<|im_end|>", "<|endoftext|>", "<tool>", "<|im_start|>"))
    got = align(qwen, shuffled, teacher_ends=(256,))
    assert got.teacher_ids[256:].tolist() == [257, 259, 256, 258]
    assert got.scored.all()


def test_mask_scores_none_of_the_differing_ones(qwen, r1):
    got = align(qwen, r1, "mask")
    assert set(np.flatnonzero(~got.scored)) == {256, 257, 258}
    assert set(np.flatnonzero(~got.drawn)) == {257}
    assert not got.renumbered
    assert got.stop_ids == (258, 256)


def test_keep_compares_numbers(qwen, r1):
    got = align(qwen, r1, "keep")
    assert got.scored.all()
    assert not got.renumbered
    assert set(got.stop_ids) == {258, 256}


def test_an_id_that_the_teacher_has_elsewhere_is_not_missing(qwen, tmp_path):
    """<tool> is 259 to the student and 256 to the teacher, which ends at 258."""
    other = make(tmp_path, ("<tool>", "<|im_start|>", "<|im_end|>"))
    got = align(qwen, other, teacher_ends=(258,))
    assert got.teacher_ids[259] == 256
    assert (got.missing, got.scored.tolist().count(False)) == (0, 1)  # <|endoftext|> has no role
    report = "\n".join(data.alignment_report(got, qwen, other, rows=(260, 259)))
    assert (
        "id 259: <tool> to the student, nothing to the teacher: remapped to <tool> (256)" in report
    )


def test_a_closed_thinking_block_is_not_an_open_one(qwen, tmp_path):
    closed = make(tmp_path, QWEN, CHATML + "<think>\n\n</think>")
    got = align(qwen, closed, teacher_ends=(258,))
    assert len(data.alignment_report(got, qwen, closed, rows=(260, 260))) == 1


def test_ids_that_the_teacher_lacks_are_masked(qwen, tmp_path):
    smaller = make(tmp_path, QWEN[:3])
    got = align(qwen, smaller, teacher_ends=(258,))
    assert np.flatnonzero(~got.scored).tolist() == [259]
    assert got.missing == 1
    assert "1 ids of the student are unknown to the teacher" in "\n".join(
        data.alignment_report(got, qwen, smaller, rows=(260, 259))
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
    assert (got.vocabulary, got.renumbered) == (7, False)
