"""The day that a chat template prints stays that of the first start."""

import datetime
import json
import types

import pytest

import opd_jax.training.make_setup as made_in
from opd_jax import data, train, workdir
from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.evaluation import run as runner
from opd_jax.evaluation import subject as subjects
from opd_jax.tools.cold_start import run as sample
from opd_jax.tools.probe import workload
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import small
from tests.support.thoughts import evaluation, problems, write, writes
from tests.support.tokenizers import LLAMA3


@pytest.fixture
def clock(monkeypatch):
    """Sets the day that programs see."""

    def set_day(day: str) -> None:
        fixed = datetime.date.fromisoformat(day)

        class Day(datetime.date):
            @classmethod
            def today(cls):
                return fixed

        for module in (made_in, data.tokenizer):
            monkeypatch.setattr(module, "datetime", types.SimpleNamespace(date=Day))

    return set_day


def dated(folders, tmp_path):
    config = small(folders, "opd")
    template = write(tmp_path / "dated.jinja", LLAMA3)
    config.student.chat_template = config.teacher.chat_template = template
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 90, 40
    config.steps, config.eval.problems, config.log.rollouts = 2, 1, 1
    return config


@pytest.mark.slow
def test_a_run_that_goes_on_tomorrow_has_the_prompts_of_today(folders, tmp_path, clock, capsys):
    config, folder = dated(folders, tmp_path), tmp_path / "run"
    clock("2026-01-31")
    train.run(config, str(folder), command=[])
    assert workdir.read_config(folder)["data"]["date"] == "2026-01-31"
    clock("2026-02-01")
    capsys.readouterr()
    config.steps = 3
    train.run(config, str(folder), command=[])
    assert "prints the date: that of data.date=2026-01-31" in capsys.readouterr().out
    prompts = [
        json.loads(x)["prompt"] for x in (folder / "rollouts.jsonl").read_text().splitlines()
    ]
    assert len(prompts) == 3
    assert all("Today Date: 31 Jan 2026" in prompt for prompt in prompts)
    subject = subjects.open_subject(str(folder), evaluation(), step=None)
    assert "31 Jan 2026" in subject.tokenizer.render("?")
    probed = workload.make_plan(dated(folders, tmp_path), folder=str(folder))
    assert "31 Jan 2026" in probed.setups[0].tokenizer.render("?")
    config.data.date = "2026-02-01"
    with pytest.raises(WorkdirError, match=r"data\.date: '2026-01-31' there, '2026-02-01' now"):
        train.run(config, str(folder), command=[])


def test_a_template_without_a_date_leaves_the_config_alone(folders):
    assert make_setup(small(folders)).config.data.date == ""


def test_evaluations_and_cold_starts_keep_their_day(folders, tmp_path, clock, monkeypatch):
    student = str(folders / "student")
    config = evaluation()
    config.student.chat_template = write(tmp_path / "dated.jinja", LLAMA3)
    cold = dated(folders, tmp_path)
    cold.data.train = problems(tmp_path / "asked.jsonl", "")
    tokenizer = data.Tokenizer(student)
    monkeypatch.setattr(runner, "sample_responses", writes(tokenizer))
    monkeypatch.setattr(sample, "sample_responses", writes(tokenizer))
    cold.rollout.max_response_tokens = 60
    for day in ("2026-01-31", "2026-02-01"):
        clock(day)
        runner.run(config, student, str(tmp_path / "eval"), command=[])
        sample.run(cold, str(tmp_path / "out.jsonl"), command=[])
    header = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert "31 Jan 2026" in header["benchmarks"]["tiny"]["first_prompt"]
    assert header["fields"]["data.date"] == "2026-01-31"
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["config"]["data"]["date"] == "2026-01-31"


@pytest.mark.parametrize("date", ["today", "2026-13-01", "31.01.2026", "20260131", 5])
def test_a_day_is_a_day(folders, date):
    config = small(folders)
    with config.ignore_type():
        config.data.date = date
    with pytest.raises(ConfigError, match=r"data\.date=") as error:
        make_setup(config)
    assert "\n" not in str(error.value)
