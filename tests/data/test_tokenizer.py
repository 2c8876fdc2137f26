"""The tokenizer of the embedded models, read back from a folder."""

import json
import shutil

import pytest

from launch.make_tiny import make_tokenizer
from opd_jax import data
from opd_jax.errors import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer"))
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> data.Tokenizer:
    return data.Tokenizer(folder)


@pytest.mark.parametrize("split", ["train", "sft", "test"])
def test_texts_survive_the_round_trip(tokenizer, split):
    for index in range(100):
        problem = data.problem(split, index)
        for text in (problem.prompt, problem.solution):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", " a  b ", "\n\n", "\u00e9 \u4e2d \U0001f600", "\\boxed{-12}"])
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer):
    vocabulary = tokenizer.vocabulary()
    digits = [vocabulary[digit] for digit in "1234567890"]
    assert tokenizer.encode("1234567890") == digits
    assert tokenizer.encode("+12=") == [vocabulary["+"], *digits[:2], vocabulary["="]]
    assert [t for t in vocabulary if any(c.isdigit() for c in t) and len(t) > 1] == []


def test_chat_template(tokenizer):
    rendered = "<|im_start|>user\nAdd 5.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat("Add 5.") == tokenizer.encode(rendered)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.chat("Add 5.", system="Be brief.") == tokenizer.encode(system + rendered)


def test_many_prompts_equal_one_by_one(tokenizer):
    earlier = (("user", "Add 4."), ("assistant", "4"))
    prompts = [("Add 5.", "", ()), ("Add 6.", "Be brief.", ()), ("é", "", earlier)]
    one_by_one = [tokenizer.chat(t, system=s, history=h) for t, s, h in prompts]
    assert tokenizer.chats(prompts) == one_by_one
    assert tokenizer.chats([]) == []


EARLIER = (("user", "Add 4."), ("assistant", "4"))


def test_earlier_turns_stand_between_the_system_and_the_question(tokenizer):
    assert tokenizer.render("Add 5.", system="Be brief.", history=EARLIER) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 4.<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAdd 5.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_earlier_turns_need_a_template_that_renders_them(folder, tmp_path):
    plain = data.Tokenizer(folder)
    plain.hf.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template, wanted one for .* 2 earlier turns"):
        plain.chat("Add 5.", history=EARLIER)
    file = tmp_path / "one_turn.jinja"
    file.write_text("{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}x")
    with pytest.raises(ModelError, match=r"cannot render a user turn and earlier turns \(one\)"):
        data.Tokenizer(folder, chat_template=str(file)).chat("Add 5.", history=EARLIER)
    for system, history, turns in [
        ("", EARLIER[:1], "a user turn and earlier turns"),
        ("", EARLIER[1:], "a user turn and earlier turns"),
        ("Be brief.", (), "a system turn"),
        ("Be brief.", EARLIER[:1], "a system turn and earlier turns"),
    ]:
        for reply in (None, "7"):
            with pytest.raises(ModelError, match=rf"cannot render {turns} \(one\)"):
                data.Tokenizer(folder, chat_template=str(file)).render(
                    "Add 5.", system=system, history=history, reply=reply
                )


def test_the_template_tells_how_a_turn_ends(tokenizer):
    assert tokenizer.end_of_turn() == tokenizer.vocabulary()["<|im_end|>"]
    closed = tokenizer.render("Add 5.", reply="7")
    assert closed.endswith("<|im_start|>assistant\n7<|im_end|>\n")


def test_a_chat_template_from_a_file(folder, tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\n")
    tokenizer = data.Tokenizer(folder, chat_template=str(file))
    assert tokenizer.render("Add 5.", system="Be brief.") == "<system>Be brief.<user>Add 5."
    assert tokenizer.end_of_turn() is None  # this one does not close a turn
    with pytest.raises(ModelError, match=r"chat template '.*nosuch' cannot be read"):
        data.Tokenizer(folder, chat_template=str(tmp_path / "nosuch"))


def test_special_tokens_are_one_id_and_not_text(tokenizer):
    vocabulary = tokenizer.vocabulary()
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(token) == [vocabulary[token]]
    assert tokenizer.decode([*tokenizer.encode("7"), vocabulary["<|im_end|>"]]) == "7"
    assert tokenizer.size == len(vocabulary) == max(vocabulary.values()) + 1


def test_a_base_model_has_no_template(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.jinja"))
    base = data.Tokenizer(str(tmp_path / "base"))
    assert not base.has_template
    assert base.chat("Add 5.") == base.encode("Add 5.")
    assert base.end_of_turn() is None
    with pytest.raises(ModelError, match=r"no chat template, wanted one for the system prompt"):
        base.chat("Add 5.", system="Be brief.")


def test_missing_and_broken_folders(folder, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere/tokenizer\.json is missing; copy the tokenizer"):
        data.Tokenizer(str(tmp_path / "nowhere"))
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(
        ModelError, match=r"broken: cannot read the tokenizer \(.+\); copy it again"
    ):
        data.Tokenizer(str(tmp_path / "broken"))


def test_a_template_that_fails_is_one_line(folder):
    broken = data.Tokenizer(folder)
    broken.hf.chat_template = "{{ raise_exception('no system turns\\nhere') }}"
    with pytest.raises(ModelError, match="chat template cannot render a user turn") as error:
        broken.chat("Start with 2, add 3.")
    assert "\n" not in str(error.value)


def test_a_prefix_of_merges_that_would_end_the_process_is_refused(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folder}/{name}", tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["continuing_subword_prefix"] = " "  # half of a merged character is cut off
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError, match="continuing_subword_prefix=' ', wanted none; copy"):
        data.Tokenizer(str(tmp_path))
