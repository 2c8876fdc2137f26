"""launch/reproduce.py: what it would start, what is not done again, its data and its table."""

import importlib
import json
import pathlib

import pytest

from launch import reproduce
from opd_jax.config.schema import flatten
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError, OpdError
from opd_jax.tools import sweep

pytestmark = pytest.mark.short


def parse(command: list[str]) -> dict:
    """The config that launch/train.py would run, every override applied with the field's own type."""
    values = dict(word.removeprefix("--").partition("=")[::2] for word in command[2:])
    file, _, recipe = values.pop("config").partition(":")
    config = importlib.import_module(f"configs.{pathlib.Path(file).stem}").get_config(recipe)
    values.pop("workdir")
    known = flatten(config.to_dict())
    for name, text in values.items():
        field = name.removeprefix("config.")
        old = known[field]  # a KeyError is a misspelt field
        if isinstance(old, tuple):
            new = tuple(int(part) for part in text.split(","))
        else:
            new = text == "True" if isinstance(old, bool) else type(old)(text)
        config.update_from_flattened_dict({field: new})
    validate(config)
    return flatten(config.to_dict())


def test_every_command_parses_and_says_what_its_method_is(tmp_path):
    plan = [
        *reproduce.model_commands(tmp_path, reproduce.METHODS),
        *reproduce.run_commands(tmp_path, reproduce.METHODS, seeds=1, steps=60),
    ]
    training = [parse(command) for _, command in plan if command[1].endswith("train.py")]
    assert len(training) == len(reproduce.MODELS) + len(reproduce.METHODS)
    runs = {name: one for name, one in zip(reproduce.METHODS, training[4:], strict=False)}
    terms = {
        name: (one["loss.pg_weight"], one["loss.lambda_gold"] > 0, one["loss.beta_kl"] > 0)
        for name, one in runs.items()
    }
    assert terms["OPD"] == (1.0, False, False)
    assert terms["OPD + KL"] == (1.0, False, True)
    assert terms["OPD + mix"] == (1.0, True, False)
    assert terms["Stable-OPD"] == (1.0, True, True)
    assert terms["SFT"] == (0.0, True, False)
    assert runs["GRPO"]["loss.group_coef"] == 1.0
    assert runs["GRPO"]["teacher.path"] == ""
    pipeline = runs["SFT, adapted teacher, stop-gradient top-k"]
    assert pipeline["student.path"] == str(tmp_path / "warm")
    assert pipeline["teacher.path"] == str(tmp_path / "adapted")
    assert pipeline["loss.form"] == "stop_gradient"


def test_seeds_are_numbered_from_0_one_folder_each(tmp_path):
    only = {"SFT": reproduce.METHODS["SFT"]}
    plan = list(reproduce.run_commands(tmp_path, only, seeds=3, steps=7))
    assert [done for done, _ in plan] == [
        tmp_path / f"sft-{seed}" / "eval" / "7" / "tiny.json" for seed in (0, 1, 2)
    ]
    assert [f"--config.seed={seed}" in command for seed, (_, command) in enumerate(plan)] == [
        True
    ] * 3


def test_models_come_before_what_starts_from_them_and_only_where_needed(tmp_path):
    only = {"GRPO": reproduce.METHODS["GRPO"]}
    made = [done.parent.name for done, _ in reproduce.model_commands(tmp_path, only)]
    assert made == ["student", "student"]


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    started = []

    def stand_in(command, **_):
        started.append(command)
        options = dict(word.partition("=")[::2] for word in command[2:])
        if "--out" in options:
            folder = pathlib.Path(options["--out"])
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        elif "--config.eval.data" not in options:
            write_run(pathlib.Path(options["--workdir"]), 0.5)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(reproduce, "write_data", lambda out: out.mkdir(exist_ok=True))
    monkeypatch.setattr(sweep.subprocess, "run", stand_in)
    flags = type("Given", (), {"out": str(tmp_path), "seeds": 2, "steps": 4, "dry": False})
    flags.only = ["OPD", "SFT"]
    monkeypatch.setattr(reproduce.flags, "FLAGS", flags)
    reproduce.main()
    assert len(started) == 2 * 2 + 2 * 2  # train and export of two models; two methods, two seeds
    started.clear()
    (tmp_path / "opd-1" / "eval" / "4" / "tiny.json").unlink()
    reproduce.main()
    assert [word for word in started[0] if "workdir" in word] == [f"--workdir={tmp_path}/opd-1"]
    assert len(started) == 1
    assert "| OPD | 2 |" in (tmp_path / "results.md").read_text()


def write_run(folder: pathlib.Path, after: float) -> None:
    for step, accuracy in ((0, 0.25), (2, 0.75), (4, after)):
        (folder / "eval" / str(step)).mkdir(parents=True, exist_ok=True)
        (folder / "eval" / str(step) / "tiny.json").write_text(json.dumps({"accuracy": accuracy}))
    rows = [
        {"rollout/truncation_rate": x, "rollout/repetition_rate": 0.0, "time/step_s": 2.0}
        for x in (0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_has_means_spreads_and_what_was_not_run(tmp_path):
    write_run(tmp_path / "opd-0", 0.25)
    write_run(tmp_path / "opd-1", 0.75)
    lines = reproduce.table(tmp_path, reproduce.METHODS, seeds=3, steps=4).splitlines()
    # 0.25 and 0.75: mean 0.5, deviation 0.5 / sqrt(2); truncation (0 0 0 0 .5) and (1 1 1 1 .5)
    assert lines[2].startswith(
        "| OPD | 2 | 25.0% ± 0.0% | 75.0% ± 0.0% | 50.0% ± 35.4% | 0.10 ± 0.00 | 0.90 ± 0.00 |"
    )
    assert lines[2].endswith("| - | - | 20 ± 0 |")
    assert lines[3].startswith("| Stable-OPD | not run | - |")
    assert "| OPD | 1 | 25.0% |" in reproduce.table(tmp_path, reproduce.METHODS, 1, 4)


def test_solutions():
    for index in range(300):
        row = reproduce.lost(index)
        ended = row["solution"].endswith(f"\\boxed{{{row['answer']}}}")
        assert ended or len(row["solution"]) >= reproduce.TOO_LONG - 1
        if not ended:  # the same line to the end
            assert len(set(row["solution"].split("\n")[-5:])) == 1
    rows = [reproduce.careless(index) for index in range(300)]
    single = [row for row in rows if row["solution"].count("\n") == 1]
    assert 180 < len(single) < 240  # 70 %
    assert all(f"={row['answer']}." in row["solution"].split("\n")[-2] for row in rows)


def test_commands_that_fail_are_counted_and_said(tmp_path):
    done = tmp_path / "done"
    commands = [(done, ["false"]), (done, ["touch", str(done)]), (done, ["false"])]
    assert sweep.run_missing(commands, tmp_path) == 1  # the third is not run: it is done
    with pytest.raises(OpdError, match=r"1 of the commands failed; see .*log\.txt"):
        sweep.require_none(1, tmp_path)
    sweep.require_none(0, tmp_path)


def test_an_unknown_method_is_named(monkeypatch):
    flags = type("Given", (), {"only": ["OPDD"], "out": "nowhere", "seeds": 1, "steps": 1})
    monkeypatch.setattr(reproduce.flags, "FLAGS", flags)
    with pytest.raises(ConfigError, match="OPDD"):
        reproduce.main()
