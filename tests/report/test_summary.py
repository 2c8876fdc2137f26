"""The summary for a terminal, and the texts made harmless."""

import numpy as np
import pytest

from opd_jax.errors import WorkdirError
from opd_jax.report import watch
from opd_jax.report.curves import Curve
from opd_jax.report.read import read_all
from opd_jax.report.summary import WIDTH, sparkline, summary
from opd_jax.report.text import clean, columns, escape, line
from tests.support.workdirs import HOSTILE, collapsing, healthy, make

pytestmark = pytest.mark.short


def test_the_summary_says_what_happened(tmp_path):
    calm = [row | {"eval/tiny/accuracy": 0.4 + row["step"] / 100} for row in healthy(30)]
    folders = [make(tmp_path / "bad", collapsing(60)), make(tmp_path / "calm", calm)]
    text = summary(read_all([str(folder) for folder in folders]))
    assert max(map(len, text.split("\n"))) <= WIDTH
    bad, calm_text = text.split("\n\n")
    assert bad.startswith(
        "A bad: step 60 of 100, 60 lines\n   Abrupt transition: since about step "
    )
    assert "No abrupt transition in 30 steps" in calm_text
    truncation = next(x for x in bad.split("\n") if x.startswith("TruncRate")).split()
    assert truncation[1:5] == ["2.0%", "98.0%", "2.0%", "98.0%"]
    accuracy = next(x for x in calm_text.split("\n") if x.startswith("held-out accuracy")).split()
    assert accuracy[2:6] == ["41.0%", "70.0%", "41.0%", "70.0%"]


def test_strange_figures_keep_the_width(tmp_path):
    rows = [row | {"rollout/length_mean": 1e29, "loss/total": -1e29} for row in healthy(5)]
    folder = make(
        tmp_path / ("long " * 30 + HOSTILE.replace("/", "").replace("\x00", "")[:20]), rows
    )
    text = summary(read_all([str(folder)]))
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert "1e+29" in text


def test_sparkline():
    assert sparkline(Curve(np.arange(4), np.array([0.0, 1.0, np.nan, 7.0]))) == "▁▂█"
    assert sparkline(Curve(np.arange(2), np.array([5.0, 5.0]))) == "▁▁"
    assert sparkline(Curve(np.arange(3), np.array([0.0, 0.5, 1.0])), share=True) == "▁▅█"
    assert len(sparkline(Curve(np.arange(100), np.arange(100.0)))) == 30


def test_clean_text():
    assert clean("a\tb\r\nc\x1b[0m") == "a\tb\nc\ufffd[0m"
    assert clean("\ud800x\u202ey\u2066") == "\ufffdx[U+202E]y[U+2066]"
    assert escape('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    assert clean(HOSTILE).encode()  # nothing that UTF-8 cannot hold
    assert columns("a漢é") == 4
    assert line("漢字 and\nmore", 8) == "漢字 an…"


def test_watching_once(tmp_path, capsys):
    folder = make(tmp_path / "run", healthy(10))
    watch.watch([str(folder)], every=1.0, once=True)
    told = capsys.readouterr().out
    assert told.startswith("A run: step 10 of 100")
    assert "\x1b" not in told
    with pytest.raises(WorkdirError, match="is not a run"):
        watch.watch([str(tmp_path)], every=1.0, once=True)


def test_watching_ends_by_ctrl_c_and_reads_only_what_changed(tmp_path, capsys, monkeypatch):
    folder, looks = make(tmp_path / "run", healthy(10)), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            make(folder, healthy(11))
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.watch([str(folder)], every=2.0)
    told = capsys.readouterr().out
    assert looks == [2.0] * 4
    assert [told.count(f"step {n} of 100") for n in (10, 11)] == [1, 1]
