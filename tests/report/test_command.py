"""launch/report.py and launch/watch.py: what they write and print, and mistakes in one line."""

import subprocess
import sys

import pytest

from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.report import run
from tests.support.lanes import slow
from tests.support.paths import ROOT
from tests.support.workdirs import collapsing, healthy, make


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / name), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


def test_a_page_and_the_summary(tmp_path):
    folder, out = str(make(tmp_path / "bad", collapsing())), tmp_path / "new" / "report.html"
    done = launch("report.py", folder, f"--out={out}", "--text")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "A bad: step 60" in done.stdout
    assert f"written to {out}" in done.stdout
    assert out.read_text().endswith("</html>\n")
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


def test_figures_alone(tmp_path, capsys):
    rows = [{"step": step, "loss/total": 1 / step} for step in range(1, 9)]
    run.run([str(make(tmp_path / "run", rows))], out=None, figures=str(tmp_path / "out"))
    assert capsys.readouterr().out == f"2 files of figures in {tmp_path / 'out'}\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "losses.png",
        "losses.svg",
    ]


def test_without_out_the_summary_is_printed(tmp_path):
    done = launch("report.py", str(make(tmp_path / "run", healthy(12))))
    assert (done.returncode, done.stderr) == (0, "")
    assert "No abrupt transition in 12 steps" in done.stdout


def test_watch_once(tmp_path):
    done = launch("watch.py", "--once", str(make(tmp_path / "run", healthy(12))))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A run: step 12 of 100, 12 lines\n")


@pytest.mark.parametrize(
    ("name", "arguments", "status", "says"),
    [
        ("report.py", [], 2, "a workdir is missing"),
        ("report.py", ["/nowhere"], 1, "workdir '/nowhere' does not exist"),
        *slow(
            ("report.py", ["DIR", "--samples=-1"], 2, "samples"),
            ("report.py", ["DIR", "--out=page.txt"], 1, "ends in .html"),
            ("watch.py", [], 2, "a workdir is missing"),
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, name, arguments, status, says):
    folder = str(make(tmp_path / "run", healthy(3)))
    done = launch(name, *(folder if argument == "DIR" else argument for argument in arguments))
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert done.stdout == ""


def test_places_that_cannot_be_written(tmp_path):
    folder = str(make(tmp_path / "run", healthy(3)))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "report.html", tmp_path / "folder.html"):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        with pytest.raises(WorkdirError, match="cannot be written"):
            run.run([folder], out=str(out))
    with pytest.raises(WorkdirError, match="give another folder with --figures"):
        run.run([folder], out=None, figures=str(tmp_path / "file"))


def test_without_matplotlib_the_summary_is_left(tmp_path, monkeypatch, capsys):
    folder = str(make(tmp_path / "run", healthy(12)))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*\.\[report\]"):
        run.run([folder], out=str(tmp_path / "report.html"))
    run.run([folder], out=None)
    assert "No abrupt transition" in capsys.readouterr().out
