"""A killed preparation goes on to the same bytes; a folder of something else is refused."""

import json
import pathlib

import pytest

from opd_jax.errors import WorkdirError
from opd_jax.tools.prepare_data import run as module
from tests.support.make_rows import lines
from tests.support.prepared import ROWS, config, done, write


def outputs(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("killed_at", [1, 2, 5, 8, 12, 14, 15, 16, 17])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, killed_at, monkeypatch):
    """The run dies at its n-th written file, with half of it on the disk."""
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(lines(40)))
    made = config(str(path), block=10, split__opd=9)
    made.decontaminate.benchmarks.amc = write(
        tmp_path / "bench.jsonl", [{"question": json.loads(next(lines(1)))["problem"]}]
    )
    done(tmp_path / "straight", made)
    whole, count = module._write, 0

    def dying(file, text):
        nonlocal count
        count += 1
        if count == killed_at:
            file.with_name(file.name + ".tmp").write_text("".join(text)[:20])
            raise KeyboardInterrupt
        whole(file, text)

    monkeypatch.setattr(module, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path / "killed", made)
    monkeypatch.setattr(module, "_write", whole)
    done(tmp_path / "killed", made)
    assert outputs(tmp_path / "killed").keys() >= outputs(tmp_path / "straight").keys()
    for name, content in outputs(tmp_path / "straight").items():
        assert (tmp_path / "killed" / name).read_bytes() == content, name


def test_finished_blocks_are_not_judged_again(tmp_path, monkeypatch):
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(lines(40)))
    judged = []
    real = module.judge

    def judge(block, **more):
        judged.append(len(block))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(block, **more)

    monkeypatch.setattr(module, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path / "out", config(str(path), block=15))
    done(tmp_path / "out", config(str(path), block=15))
    assert judged == [15, 15, 10, 10]
    done(tmp_path / "out", config(str(path), block=15))  # finished: the report is read
    assert judged == [15, 15, 10, 10]


def test_a_folder_of_something_else_is_refused(tmp_path, train):
    done(tmp_path / "out", config(train))
    with pytest.raises(WorkdirError, match=r"another config or other files \(different: seed\)"):
        done(tmp_path / "out", config(train, seed=1))
    write(pathlib.Path(train), ROWS[1:])
    with pytest.raises(WorkdirError, match=r"different: file .*raw\.jsonl"):
        done(tmp_path / "out", config(train))
    with pytest.raises(WorkdirError, match="is not empty and was not created by prepare_data"):
        done(tmp_path, config(train))
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot be written"):
        done(tmp_path / "file" / "out", config(train))
    (tmp_path / "out" / "config.json").write_text("[1")
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read"):
        done(tmp_path / "out", config(train))
