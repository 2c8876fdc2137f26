r"""The seam between prompt and response: openings, ids behind a prompt, texts that are complete."""

import datetime
import json
import string

import pytest

from opd_jax import data
from opd_jax.data import template_boundary
from tests.support import tokenizers as made

pytestmark = pytest.mark.short

EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|im_start|>assistant\n", ""),
        ("<Assistant><think>\n", "<think>\n"),
        ("<Assistant><think>", "<think>"),
        ("User: 2+3? Assistant: <think> ", "<think> "),
        ("<|im_start|>assistant\n<thought>\n", "<thought>\n"),
        ("<seed:think>", "<seed:think>"),
        ("[/INST][THINK]", "[THINK]"),
        ("assistant\n" + EMPTY, EMPTY),
        ("assistant\n<think>\nI have finished.\n</think>\n\n", "<think>\nI have finished.\n</think>\n\n"),
        ("[THINK][/THINK]", "[THINK][/THINK]"),
        ("Write <think> {thoughts} </think> first.<|im_end|>\n<|im_start|>assistant\n", ""),
        ("[INST] Begin with <think>. [/INST]", ""),
        ("<start_of_turn>model\n", ""),
    ],
)  # fmt: skip
def test_what_a_prompt_has_opened(prompt, opening):
    assert template_boundary.opening(prompt) == opening
    still = bool(opening) and "/" not in opening
    assert template_boundary.is_open(opening) == still
    assert template_boundary.opening(prompt, closed=False) == (opening if still else "")


@pytest.mark.parametrize(
    ("solution", "begun", "rest"),
    [
        ("<think>\nso\n</think>\n5", "<think>\n", "so\n</think>\n5"),
        ("<think>\n\nso\n</think>", "<think>\n", "\nso\n</think>"),  # no more than was opened
        ("<think>so</think>", "<think>\n", "so</think>"),
        ("\n<think> so</think>", "<think>\n", "so</think>"),
        ("<think>\n<think>\nso", "<think>\n", "<think>\nso"),  # once, so that it round-trips
        ("<think>\nso", "<think>", "\nso"),
        ("so\n</think>\n5", "<think>\n", "so\n</think>\n5"),
        ("<thinking>so", "<think>\n", "<thinking>so"),
        ("<think></think>5", EMPTY, "5"),
        (EMPTY + "5", EMPTY, "5"),
        ("5", EMPTY, "5"),
        ("[THINK]so[/THINK]5", "[THINK]", "so[/THINK]5"),
        ("<think>\nso\n</think>", "", "<think>\nso\n</think>"),
    ],
)
def test_a_solution_is_stripped_of_what_its_prompt_has_opened(solution, begun, rest):
    assert template_boundary.remainder(solution, begun) == rest


@pytest.mark.parametrize(
    ("solution", "begun", "reason"),
    [
        ("<think>\nso\n</think>\n5", "<think>\n", None),
        ("so\n</think>\n5", "<think>\n", None),
        ("2+3=5", "<think>\n", "without thoughts"),
        ("<think>\n2+3=5", "<think>\n", "without thoughts"),
        ("<thought>so</thought>5", "<think>\n", "without thoughts"),
        ("so[/THINK]5", "[THINK]", None),
        ("2+3=5", "", None),
        ("<think>so</think>5", "", None),
        ("so\n</think>\n5", "", "of unopened thoughts"),
        ("5", EMPTY, None),
        (EMPTY + "5", EMPTY, None),
        ("<think>so</think>5", EMPTY, "with thoughts"),
        ("so</think>5", EMPTY, "of unopened thoughts"),
        ("Sure!\n<think>\nso\n</think>\n5", "<think>\n", "that opens thoughts twice"),
        ("<think>\n<think>\nso\n</think>", "<think>\n", "that opens thoughts twice"),
        ("<think>\n<think>\nso\n</think>", "", "that opens thoughts twice"),
        ("[THINK]so[THINK]so[/THINK]5", "", "that opens thoughts twice"),
        ("<think>\nso", "", "of unclosed thoughts"),
        ("so</think>5<think>so", "<think>\n", "of unclosed thoughts"),
        ("Sure <think>a</think>5", EMPTY, "with thoughts"),
        ("so</think>5</think>", "<think>\n", "of unopened thoughts"),
        ("Sure <think>a</think>b<think>c</think>5", "", None),
        ("a <thought> b</think>5", "<think>\n", None),
    ],
)
def test_what_cannot_be_made_right_is_named(solution, begun, reason):
    found = template_boundary.fault(solution, begun)
    assert (found and found[0]) == (reason and f"golden solution {reason}")
    assert found is None or "\n" not in found[1]


THOUGHTS = "<think>\nso\n</think>\n2+3=5."


@pytest.mark.parametrize("solution", ["2+3=5.", THOUGHTS, "\n2", " 2", "so"])
@pytest.mark.parametrize("template", [made.CHATML, made.OPENS, made.CLOSES, made.LLAMA3, None])
def test_golden_ids_open_thoughts_once(tmp_path, template, solution):
    tokenizer = made.byte_level(tmp_path, template)
    problem = data.Problem("a", "2+3?", solution, "5")
    style = data.PromptStyle()
    whole = style.prompts([problem], tokenizer)[0] + style.golden([problem], tokenizer)[0]
    text = tokenizer.hf.decode(whole)
    opens = template == made.OPENS
    wanted = solution.removeprefix("<think>\n") if opens else solution
    assert text == style.texts([problem], tokenizer)[0] + wanted
    assert text.count("<think>") == (opens or solution == THOUGHTS)


@pytest.mark.parametrize("template", [made.OPENS, made.R1, made.QWEN3])
def test_a_response_round_trips_as_golden_data(tmp_path, template):
    """Sampled, written, and read as golden data: the same ids; the thoughts opened elsewhere too."""
    tokenizer = made.byte_level(tmp_path / "opens", template)
    style = data.PromptStyle()
    asked = data.Problem("a", "2+3?", "", "5")
    prompt = style.prompts([asked], tokenizer)[0]
    for response in ("so\n</think>\n\n5", "\nso</think>5", "<think>\nso</think>5", ""):
        ids = tokenizer.encode(response)
        text = data.response_text(tokenizer, prompt, [*ids, 258])
        assert text == "<think>\n" + response
        written = data.Problem("a", "2+3?", text, "5")
        assert style.golden([written], tokenizer)[0] == ids
    plain = made.byte_level(tmp_path / "plain", made.CHATML)
    assert plain.decode(style.golden([written], plain)[0]).startswith("<think>\n")


@pytest.mark.parametrize("solution", ["2+3=5.", "so 2", " 2", "\nso", "[2]", "é"])
@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
@pytest.mark.parametrize(
    "template",
    {
        "newline": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "colon": "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "special": "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}",
        "llama2": made.LLAMA2,
    }.items(),
    ids=lambda item: item[0],
)
def test_golden_ids_are_those_of_the_rendered_conversation(tmp_path, kind, template, solution):
    """Before: behind a line feed `▁2`, `+`, ... in place of `2`, `+`, ..."""
    tokenizer = made.sentencepiece(tmp_path, template[1], kind=kind)
    style, problem = data.PromptStyle(), data.Problem("a", "2+3?", solution, "5")
    golden = style.golden([problem], tokenizer)[0]
    ids = style.prompts([problem], tokenizer)[0] + golden
    conversation = tokenizer.encode(tokenizer.render("2+3?", reply=solution))
    assert conversation[: len(ids)] == ids
    prompt = style.prompts([problem], tokenizer)[0]
    assert style.golden(
        [data.Problem("a", "2+3?", data.response_text(tokenizer, prompt, golden), "5")], tokenizer
    ) == [golden]


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
def test_a_base_models_golden_ids_are_those_of_the_whole_text(tmp_path, kind):
    tokenizer = made.sentencepiece(tmp_path, None, kind=kind)
    style = data.PromptStyle("{problem}\n")
    problem = data.Problem("a", "2+3?", "2+3=5.", "5")
    golden = style.golden([problem], tokenizer)[0]
    assert tokenizer.hf.convert_ids_to_tokens(golden) == list("2+3=5.")
    assert style.prompts([problem], tokenizer)[0] + golden == tokenizer.hf("2+3?\n2+3=5.").input_ids


def test_a_token_across_the_seam_does_not_move_it(tmp_path):
    """ "\\n" + "\\n2" would be one token and the digit; the prompt has its line feed already."""
    folder = tmp_path / "merged"
    made.byte_level(folder, made.CHATML)
    file = folder / "tokenizer.json"
    inner = json.loads(file.read_text())
    inner["model"]["vocab"]["ĊĊ"] = 299
    inner["model"]["merges"] = [["Ċ", "Ċ"]]
    file.write_text(json.dumps(inner))
    tokenizer = data.Tokenizer(str(folder))
    assert tokenizer.encode("\n\n") == [299]
    problem = data.Problem("a", "2+3?", "\n2", "5")
    assert tokenizer.decode(data.PromptStyle().golden([problem], tokenizer)[0]) == "\n2"


def test_a_prompt_of_another_model_opens_what_the_first_one_opened():
    header = "<Assistant>"
    for own, begun, wanted in (
        ("<think>\n", "", header),
        ("", "<think>\n", header + "<think>\n"),
        ("<think>\n", "<think>", header + "<think>"),
        (EMPTY, "<think>\n", header + "<think>\n"),
        (EMPTY, "", header + EMPTY),
        ("", "", header),
    ):
        assert template_boundary.begun_as(header + own, begun) == wanted


def test_notes_name_what_the_prompts_do(tmp_path):
    def notes(template, name, **more):
        made.byte_level(tmp_path / name, template)
        return template_boundary.notes("teacher", data.Tokenizer(str(tmp_path / name), **more))

    assert notes(made.CHATML, "chatml") == []
    assert notes(None, "base") == []
    assert notes(made.CLOSES, "on") == []
    assert notes(made.LLAMA2, "llama2") == []  # needs no opening
    for template, name in ((made.OPENS, "opens"), (made.R1, "r1"), (made.QWEN3, "qwen3")):
        (line,) = notes(template, name)
        assert line.startswith("teacher: prompts end in '<think>\\n'; golden solutions continue")
    (line,) = notes(made.CLOSES, "off", enable_thinking=False)
    assert line.startswith(f"teacher: prompts end in {EMPTY!r}: the thoughts are closed")
    (line,) = notes(made.TURNS, "turns")
    assert "the chat template has no generation prompt" in line
    assert "'<|im_start|>assistant'" in line
    assert line.endswith("--config.teacher.chat_template=FILE")
    (line,) = notes(made.LLAMA3, "dated", date="2026-01-31")
    assert "data.date=2026-01-31" in line


@pytest.mark.parametrize("day", ["2024-02-29", "2026-11-30"])
def test_the_day_of_a_prompt_is_fixed(tmp_path, day):
    made.byte_level(tmp_path, made.LLAMA3)
    tokenizer = data.Tokenizer(str(tmp_path), date=day)
    assert {"2024-02-29": "29 Feb 2024", "2026-11-30": "30 Nov 2026"}[day] in tokenizer.render("?")
    assert tokenizer.prints_date


def test_every_directive_of_a_date_is_rendered(tmp_path):
    """Whatever strftime knows: each letter with each flag, a width and the modifiers, a new line too."""
    letters = string.ascii_letters.replace("E", "").replace("O", "")
    flags = ("", "-", "_", "0", "^", "#", "E", "O", "4", "_10")
    directives = " ".join(f"%{flag}{letter}" for flag in flags for letter in letters)
    made.byte_level(tmp_path, f"{{{{ strftime_now('{directives} %% %%d') }}}}")
    day = datetime.date(2024, 2, 29)
    text = data.Tokenizer(str(tmp_path), date=str(day)).render("?")
    assert text == f"{day.strftime(directives)} % %d"


BOS_OBJECT = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "rstrip": False}


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({}, "a"),
        ({"add_bos_token": False}, "a"),
        ({"add_bos_token": True}, "<|endoftext|>"),
        ({"add_bos_token": True, "bos_token": None}, "a"),
        ({"add_bos_token": None}, "a"),
        ({"add_bos_token": 0}, "a"),
        ({"add_bos_token": 1}, "<|endoftext|>"),
        ({"add_bos_token": True, "bos_token": "<|im_start|>"}, "<|im_start|>"),
        ({"add_bos_token": True, "bos_token": BOS_OBJECT}, "<|endoftext|>"),
        ({"add_bos_token": True, "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ({"add_bos_token": False, "bos_token": None}, "a"),
    ],
)
def test_a_plain_prompt_begins_as_the_folder_asks(tmp_path, config, first):
    """transformers reads tokenizer.json alone, which adds nothing here: without the field "a" is first."""
    made.byte_level(tmp_path, None)
    file = tmp_path / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"bos_token": "<|endoftext|>"} | config
    file.write_text(json.dumps(fields))
    tokenizer = data.Tokenizer(str(tmp_path))
    ids = tokenizer.chat("ab")
    assert tokenizer.hf.convert_ids_to_tokens(ids)[0] == first
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.chat(first + "ab").count(ids[0]) == 1 + (first == "a")  # only once
    assert ["add_bos_token" in line for line in template_boundary.notes("student", tokenizer)] == (
        [True] if config.get("add_bos_token") else []
    )


def test_a_beginning_token_that_tokenizer_json_adds_is_there_once(tmp_path):
    tokenizer = made.sentencepiece(tmp_path, None, kind="prepend", config={"add_bos_token": True})
    assert tokenizer.chat("so")[:2] == [1, *tokenizer.encode("so")[:1]]
