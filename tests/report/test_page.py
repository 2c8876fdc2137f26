"""The page and its figures: complete, escaped, bounded in size; what a run lacks is a sentence."""

import base64
import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from opd_jax.report import drawing, tables
from opd_jax.report.figures import Line, Mark, Panel, figures, label, letter
from opd_jax.report.page import page
from opd_jax.report.read import read_all
from tests.support.workdirs import HOSTILE, collapsing, healthy, make, rollout


def report(*folders, samples: int = 4) -> str:
    runs = read_all([str(folder) for folder in folders])
    return page(runs, figures(runs), samples=samples)


class Checked(HTMLParser):
    """Tags that are closed in order, ids, and whatever could load or run something."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts = self.outside = 0
        self.feed(text)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.scripts += tag == "script" and "type" not in found
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "xlink:href"):
                self.outside += not value.startswith(("#", "data:text/csv"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A collapsed run and a stable one that logs other keys, on one page."""
    root = tmp_path_factory.mktemp("runs")
    calm = [row | {"optim/grad_norm_opd": 1.0, "optim/grad_norm_sft": 0.5,
                   "optim/grad_cosine_opd_sft": 0.1} for row in healthy(30)]  # fmt: skip
    answers = {"0/tiny": {"accuracy": 0.4, "stderr": 0.05, "truncation_rate": 0.0}}
    answers["30/tiny"] = answers["0/tiny"] | {"accuracy": 0.7}
    folders = [
        make(root / "bad", collapsing(60), rollouts=[rollout(1), rollout(60)]),
        make(root / "calm", calm, answers=answers),
    ]
    return folders, report(*folders)


def test_two_runs_on_one_page(two):
    _, text = two
    checked = Checked(text)
    assert (checked.scripts, checked.outside) == (1, 0)  # works offline
    for heading in ("TruncRate of rollouts", "Share of repetitive tokens", "B: gradient norm of each term",
                    "A: standardised, onset marked", "B: standardised, no onset"):  # fmt: skip
        assert heading in text
    panel = re.search(r'id="rollouts-0-figure_1".*?</svg>', text, re.DOTALL)
    assert panel
    assert panel[0].count(">A</text>") == panel[0].count(">B</text>") == 1  # both, in the legend
    assert "A  bad logged no gradients of single terms" in text
    assert "Left out: Accuracy of rollouts: in no run (rollout/accuracy)." in text
    assert re.search(r"<strong>B</strong> calm: No abrupt transition in 30 steps", text)
    assert "70.0% ± 5.0%" in text
    assert "no rollouts.jsonl" in text.replace("No rollouts", "no rollouts")


def test_tokens_are_marked_by_more_than_colour(two):
    _, text = two
    assert '<i>[49]</i><i class="n4">[43]</i><i class="u">[49]</i><i class="p2">[61]</i>' in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert re.search(r"\.n1, [^}]*dotted", style)
    assert re.search(r"\.p1, [^}]*solid", style)


def test_the_numbers_can_be_downloaded(two):
    _, text = two
    found = re.search(
        r'download="A-metrics.csv" href="data:text/csv;charset=utf-8;base64,([^"]+)"', text
    )
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(found[1]).decode())))
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 61)]
    assert float(rows[59]["rollout/truncation_rate"]) == pytest.approx(0.98)
    drawn = re.search(r'download="rollouts.csv" href="[^,]+,([^"]+)"', text)
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(drawn[1]).decode())))
    b = [r for r in rows if r["curve"] == "B" and r["panel"] == "TruncRate of rollouts"]
    assert [float(row["value"]) for row in b] == [0.02] * 30


def test_everything_shown_is_escaped(tmp_path):
    name = "x<script>alert(1)<x> $y_1^2$ \"q' _"
    rows = [row | {f"time/{HOSTILE}_s": 1.0, f"optim/grad_norm_{HOSTILE}": 1.0, "text": HOSTILE,
                   f"eval/{HOSTILE.replace('/', '')}/accuracy": 0.5} for row in healthy(12)]  # fmt: skip
    lines = [rollout(1, prompt=HOSTILE, outcome=HOSTILE), rollout(2, response_ids=[60, 62])]
    fields = {"student_path": f"/nowhere/{HOSTILE}".replace("\x00", "")}
    folder = make(tmp_path / name, rows, rollouts=lines, **fields)
    (folder / "run.json").write_text(
        '{"command": ["</pre><script>x"], "devices": ["<b>"], "commit": 3}'
    )
    text = report(folder)
    text.encode()  # no lone surrogate is left
    checked = Checked(text)
    assert (checked.scripts, checked.outside) == (1, 0)
    assert "<script>alert" not in text
    assert "</pre><script>x" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert "[U+202E]evil" in text


def test_only_our_script_may_run(two):
    _, text = two
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'$", policy)


def test_an_empty_run_has_sentences_and_no_plot(tmp_path):
    text = report(make(tmp_path / "run", []))
    Checked(text)
    assert "<svg" not in text
    for said in ("No run has a curve to draw.", "No evaluation in the files of A.", "No run logged times.",
                 "No rollouts in the log: nothing to judge.", "metrics.jsonl is empty"):  # fmt: skip
        assert said in text


def test_sft_without_rollouts_says_what_it_lacks(tmp_path):
    rows = [{"step": i, "loss/total": 1 / i, "loss/sft": 1 / i} for i in range(1, 9)]
    text = report(make(tmp_path / "run", rows))
    assert "loss/sft" in text
    assert "No run measured held-out answers on the way" in text
    assert "TruncRate of rollouts: in no run (rollout/truncation_rate)" in text
    assert "No run has score/repeated_token_fraction or the two advantages." in text


def test_a_long_log_makes_a_small_page(tmp_path):
    rows = [row | {"step": i} for i, row in enumerate(healthy(50) * 150)]  # 7,500 steps
    text = report(make(tmp_path / "run", rows))
    assert len(text) < 4e6
    assert "thinned to 400 points, each the mean of up to 19 logged steps" in text
    assert "all are in metrics.jsonl" in text


def test_the_papers_rows_stand_beside_the_runs(tmp_path):
    found = {"math500": {"accuracy": 0.8, "stderr": 0.02}}
    folder = make(tmp_path / "run", healthy(3), student_path="Qwen/Qwen2.5-Math-7B",
                  answers={"3/math500": found["math500"]})  # fmt: skip
    (run,) = read_all([str(folder)])
    text = tables.beside_papers(0, run)
    assert '<td>run</td><td class="n">80.0 ± 2.0</td>' in text
    assert '<td>OPD</td><td class="n">80.0</td>' in text  # 2604.08527, Table 1
    assert "arXiv 2604.08527, Table 1" in text


def test_many_runs(tmp_path):
    folders = [make(tmp_path / f"r{i}", healthy(12)) for i in range(8)]
    runs = read_all([str(folder) for folder in folders])
    made = {figure.name: figure for figure in figures(runs)}
    assert len(made["together"].panels) == 6
    assert "first 6 of 8 runs" in made["together"].missing[-1]
    assert [line.label for line in made["rollouts"].panels[0].lines] == list("ABCDEFGH")
    assert label(7, runs[7]) == "H  r7"
    assert letter(26) == "A2"


@pytest.mark.parametrize("form", ["lines", "stacked"])
def test_a_panel_is_sound_xml_whatever_its_names(tmp_path, form):
    (run,) = read_all([str(make(tmp_path / "run", healthy(50)))])
    curve = run.curves["optim/grad_norm"]
    lines = [Line(HOSTILE, 0, curve), Line("_hidden", 1, curve, curve)]
    panel = Panel(
        HOSTILE, "norm", lines, [Mark(3, "onset", -1, "onset 3"), Mark(4, "alarm", 0, "")], form
    )
    svg = drawing.svg(panel, "name")
    ElementTree.fromstring(svg)
    assert "_hidden" in svg  # matplotlib would leave it out
    assert "$x_1$" in svg  # and read this as mathematics


def test_export(tmp_path, two):
    folders, _ = two
    runs = read_all([str(folder) for folder in folders])
    made = [figure for figure in figures(runs) if figure.name in ("rollouts", "held-out")]
    files = drawing.export(made, ["A  bad", "B  $calm$"], tmp_path / "out")
    assert [file.name for file in files] == ["rollouts.png", "rollouts.svg"]  # nothing was held out
    assert files[0].read_bytes().startswith(b"\x89PNG")
    ElementTree.fromstring(files[1].read_text())
