"""Ids without a row of the embedding are refused before a run begins, whatever text holds them."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from launch.make_tiny import make_tokenizer
from opd_jax import data, models, train
from opd_jax.errors import DataError
from opd_jax.evaluation import run as runner
from opd_jax.tools import probe
from opd_jax.tools.cold_start import run as sample
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import small
from tests.support.thoughts import THOUGHTS, evaluation, problems, write
from tests.support.tokenizers import OPENS


@pytest.fixture(scope="module")
def larger(folders, tmp_path_factory) -> pathlib.Path:
    """Models whose tokenizer knows one id more (<think>) than their embeddings have rows."""
    root = tmp_path_factory.mktemp("larger")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    for name in ("student", "teacher"):
        shutil.copytree(folders / name, root / name)
        tokenizer.save_pretrained(root / name)
    assert models.load_config(str(root / "student")).vocab_size == tokenizer.vocab_size
    return root


def unknown(config, **changes):
    for field, value in changes.items():
        *sections, name = field.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


SAYS = r"'<think>', id 308, wanted ids below 308, the rows of the {}'s embedding; remove"


@pytest.mark.parametrize(
    ("where", "method", "says"),
    [
        ("golden", "sft", "golden solution holds " + SAYS.format("student")),
        ("golden", "stable_opd", "golden solution holds " + SAYS.format("student")),
        ("student's prompt", "opd", "prompt holds " + SAYS.format("student")),
        ("student's template", "opd", "prompt holds " + SAYS.format("student")),
        ("system prompt", "sft", "prompt holds " + SAYS.format("student")),
        ("teacher's prompt", "opd", "teacher's prompt holds " + SAYS.format("teacher")),
        ("teacher's template", "opd", "teacher's prompt holds " + SAYS.format("teacher")),
        ("privileged prompt", "opd", "teacher's prompt holds " + SAYS.format("teacher")),
        ("held-out prompt", "opd", "eval.data: .*prompt holds " + SAYS.format("student")),
        ("held-out privileged prompt", "opd", "eval.data: .*prompt holds " + SAYS.format("teacher")),
    ],
)  # fmt: skip
def test_every_id_that_a_model_reads_is_checked_first(larger, tmp_path, where, method, says):
    config = small(larger, method)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 60, 100
    config.data.train = problems(tmp_path / "data.jsonl", "3", "3")
    config.eval.data = problems(tmp_path / "held.jsonl", "3")
    make_setup(config)  # a special token that no text holds may lie beyond
    thought = problems(tmp_path / "thought.jsonl", THOUGHTS)
    opens = write(tmp_path / "opens.jinja", OPENS)
    change = {
        "golden": {"data__train": thought},
        "student's prompt": {"data__prompt_template": "{problem} <think>"},
        "student's template": {"student__chat_template": opens},
        "system prompt": {"data__system_prompt": "Use <think>."},
        "teacher's prompt": {"data__teacher_prompt_template": "{problem} <think>"},
        "teacher's template": {"teacher__chat_template": opens},
        "privileged prompt": {
            "data__train": thought, "data__teacher_prompt_template": "{problem} {solution}",
        },
        "held-out prompt": {
            "eval__data": write(
                tmp_path / "asks.jsonl", json.dumps({"problem": "<think> 1+2?", "answer": "3"}) + "\n"
            ),
        },
        "held-out privileged prompt": {
            "eval__data": thought, "data__teacher_prompt_template": "{problem} {solution}",
        },
    }[where]  # fmt: skip
    with pytest.raises(DataError, match=says) as error:
        train.run(unknown(config, **change), str(tmp_path / "run"), command=[])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_fewer_rows_that_reads_the_students_prompts(larger, folders, tmp_path):
    config = small(larger, "opd")
    config.student.path = str(tmp_path / "student")
    shutil.copytree(larger / "student", tmp_path / "student")
    _, params = models.load(str(folders / "student"))
    wide = models.load_config(str(folders / "student"))
    table = np.asarray(params["embed"]["embedding"])
    params["embed"]["embedding"] = np.concatenate([table, table[:1]])
    shutil.rmtree(tmp_path / "student")
    tokenizer = data.Tokenizer(str(larger / "student")).hf
    models.save(
        str(tmp_path / "student"),
        type(wide)(**{**vars(wide), "vocab_size": 309}),
        params,
        tokenizer,
    )
    config.data.prompt_template = "{problem} <think>"
    with pytest.raises(DataError, match=SAYS.format("teacher")):
        make_setup(config)


def test_cold_start_evaluation_and_probes_check_their_prompts(larger, tmp_path):
    config = small(larger, "opd")
    config.data.prompt_template = "{problem} <think>"
    with pytest.raises(DataError, match="prompt holds " + SAYS.format("teacher")):
        sample.run(config, str(tmp_path / "out.jsonl"), command=[])
    with pytest.raises(DataError, match="prompt holds " + SAYS.format("student")):
        probe.run("pair", config, command=[])
    config = evaluation()
    config.data.prompt_template = "{problem} <think>"
    with pytest.raises(DataError, match="prompt holds " + SAYS.format("student")):
        runner.run(config, str(larger / "student"), str(tmp_path / "eval"), command=[])
    assert not list(tmp_path.iterdir())
