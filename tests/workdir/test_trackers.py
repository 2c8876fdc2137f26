"""TensorBoard and Weights & Biases are told what metrics.jsonl holds, also of a resumed run."""

import importlib.util
import json
import pathlib
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from opd_jax import config as configuration
from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.workdir import trackers

pytestmark = pytest.mark.short


def scalars(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show: {tag: {step: value}}. A start at a step drops what is from there on."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = {
                    tag: {step: value for step, value in known.items() if step < event.step}
                    for tag, known in found.items()
                }
            for value in event.summary.value:
                known = found.setdefault(value.tag, {})
                assert event.step not in known, f"{value.tag} twice at step {event.step}"
                known[event.step] = value.simple_value
    return found


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def config(**fields: object):
    made = configuration.default()
    made.log.update(fields)
    return made


def test_tensorboard_follows_resumes_and_rollbacks(tmp_path):
    file, settings = tmp_path / "metrics.jsonl", config(tensorboard=True)
    log = trackers.Log(file, resume_step=-1, config=settings)
    for step in range(6):
        log.write({"step": step, "loss/total": float(step), "eval/tiny/accuracy": 0.5})
    log.go_back(3)
    log.write({"step": 4, "loss/total": 40.0})
    log.close()
    log = trackers.Log(file, resume_step=3, config=settings)  # step 4 was after the checkpoint
    log.write({"step": 4, "loss/total": 400.0})
    log.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["loss/total"] == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 400.0}
    assert found["loss/total"] == {row["step"]: row["loss/total"] for row in lines(file)}
    assert found["eval/tiny/accuracy"] == dict.fromkeys(range(4), 0.5)


def test_a_run_that_begins_anew_shows_nothing_of_before(tmp_path):
    for value in (1.0, 2.0):
        log = trackers.Log(
            tmp_path / "metrics.jsonl", resume_step=-1, config=config(tensorboard=True)
        )
        log.write({"step": 0, "a/b": value})
        log.close()
    assert scalars(tmp_path / "tensorboard") == {"a/b": {0: 2.0}}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(WorkdirError, match=r"log\.tensorboard=False"):
        trackers.Log(tmp_path / "metrics.jsonl", resume_step=-1, config=config(tensorboard=True))


def test_nothing_is_imported_or_written_unasked(tmp_path):
    log = trackers.Log(tmp_path / "metrics.jsonl", resume_step=-1, config=config())
    log.write({"step": 1, "a/b": 1.0})
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told."""
    told = types.SimpleNamespace(init=[], log=[], finished=0)

    class Run:
        def log(self, row, step):
            told.log.append((step, row))

        def finish(self):
            told.finished += 1

    def init(**given):
        if given["mode"] == "online":
            raise fake.errors.Error("no API key\nmore")
        told.init.append(given)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings = init, dict  # type: ignore[attr-defined]
    fake.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return told


def test_wandb_gets_the_same_keys_offline(tmp_path, wandb):
    log = trackers.Log(tmp_path / "metrics.jsonl", resume_step=-1, config=config(wandb="mine"))
    log.write({"step": 1, "a/b": 1.0})
    log.write({"step": 2, "a/b": 2.0})
    log.go_back(1)
    log.write({"step": 2, "a/b": 20.0})  # its history only grows: this one it is not told
    log.write({"step": 3, "a/b": 3.0})
    log.close()
    assert wandb.log == [(1, {"a/b": 1.0}), (2, {"a/b": 2.0}), (3, {"a/b": 3.0})]
    assert wandb.finished == 1
    (given,) = wandb.init
    assert (given["project"], given["mode"], given["dir"]) == ("mine", "offline", str(tmp_path))
    assert given["config"]["loss"]["pg_weight"] == 1.0
    assert given["settings"]["x_disable_meta"]  # no command line, no environment
    assert given["settings"]["disable_git"]


def test_a_workdir_is_one_run_of_wandb(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "shared")
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "metrics.jsonl"
        trackers.Log(file, resume_step=3, config=config(wandb="mine")).close()
    first, again, other = wandb.init
    assert first["id"] == again["id"] != other["id"]
    assert (first["mode"], first["resume"]) == ("shared", "allow")


def test_what_wandb_refuses_is_one_line(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=r"no API key\); run `wandb login`"):
        trackers.Log(tmp_path / "metrics.jsonl", resume_step=-1, config=config(wandb="mine"))


def test_a_package_that_is_missing_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trackers.require(config().log)
    with pytest.raises(
        ConfigError, match=r"pip install -c tests/constraints.txt -e '\.\[tensorboard\]'"
    ):
        trackers.require(config(tensorboard=True).log)
    with pytest.raises(ConfigError, match=r"'\.\[wandb\]'.* --config\.log\.wandb=$"):
        trackers.require(config(wandb="mine").log)


def test_a_folder_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if importlib.util.find_spec("wandb").origin is None:
        with pytest.raises(ConfigError, match="needs wandb"):
            trackers.require(config(wandb="mine").log)
