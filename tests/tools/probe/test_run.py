"""Whole probes: of pairs and second teachers, of a run's checkpoint, by command; what they refuse."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import opd
from opd_jax import config as configuration
from opd_jax import models
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError, DataError, OpdError, WorkdirError
from opd_jax.tools import probe
from opd_jax.tools.probe import continuation, pair, workload, writing
from opd_jax.tools.probe import run as runner
from tests.checkpoint.test_export import write_run
from tests.conftest import noisy_params
from tests.data.test_vocabulary import CHATML, QWEN, make
from tests.support.paths import ROOT

# The same special tokens under other numbers, and a template with a turn of its own.
SHUFFLED = ("<tool>", "<|im_end|>", "<|endoftext|>", "<|im_start|>")
TERSE = "{% for m in messages %}<|im_start|>Q {{ m.content }}<|im_end|>{% endfor %}"


# ---- whole probes


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """Random models `student`, `teacher` (the student's ids), `other` (special ids of its own)."""
    root = tmp_path_factory.mktemp("models")
    kinds = {"student": (QWEN, CHATML), "teacher": (QWEN, CHATML), "other": (SHUFFLED, TERSE)}
    for seed, (name, (special, template)) in enumerate(kinds.items()):
        tokenizer = make(root / f"{name}-tokenizer", special, template)
        model = models.ModelConfig(
            model_type="qwen2", vocab_size=260, hidden_size=16, intermediate_size=32, num_layers=2,
            num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6,
            max_position=80, tie_embeddings=True, qkv_bias=True, qk_norm=False,
            eos_token_ids=(256 + special.index("<|endoftext|>"),),
        )  # fmt: skip
        models.save(str(root / name), model, noisy_params(model, seed), tokenizer.hf)
    return root


def questions(file: pathlib.Path, **more: object) -> str:
    rows = [{"problem": f"{i}+2=", "answer": str(i + 2), **more} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def small(folders, tmp_path):
    """Seven problems, responses of 24 tokens, batches of four."""
    config = configuration.default()
    config.student.path, config.teacher.path = str(folders / "student"), str(folders / "teacher")
    config.data.train = questions(tmp_path / "problems.jsonl")
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 40, 24
    config.rollout.temperature = 1.0
    config.probe.problems, config.probe.batch = 7, 4
    config.scoring.token_chunk = 64
    return config


def without_speed(report: dict) -> dict:
    kept = json.loads(json.dumps(report))
    del kept["run"], kept["student"]["speed"]
    for teacher in kept["teachers"]:
        del teacher["speed"]
    return kept


def test_pair_of_a_student_and_itself_another_and_one_with_other_ids(
    small, folders, tmp_path, capsys
):
    paths = [str(folders / name) for name in ("student", "teacher", "other")]
    file = tmp_path / "new" / "report.json"
    report = probe.run("pair", small, teachers=paths, out=str(file), command=["test"])
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    itself, another, other = report["teachers"]
    assert itself["figures"]["reverse_kl"] == itself["figures"]["advantage_mean"] == 0.0
    assert itself["figures"]["overlap_ratio"] == 1.0
    assert another["figures"]["reverse_kl"] > 0.01
    assert another["figures"]["advantage_mean"] < 0
    assert 0 < another["figures"]["overlap_ratio"] < 1
    assert other["figures"]["tokens"] == another["figures"]["tokens"]  # all of its ids are remapped
    assert [teacher["path"] for teacher in report["teachers"]] == report["teachers_from"] == paths
    assert len(report["records"]) == 7
    record = report["records"][0]
    assert record["student"]["grade"] in ("WRONG", "UNPARSED")
    assert {"text", "grade", "length", "advantage", "overlap_ratio"} <= record["teacher 3"].keys()
    assert report["run"]["command"] == ["test"]
    assert report["config"]["probe"]["problems"] == 7
    said = capsys.readouterr().out
    assert "verdict: teacher 2, " in said
    assert "remapped to <tool> (256)" in said  # the report on the vocabularies
    for teacher in report["teachers"]:
        assert teacher["conclusion"] in said
    again = probe.run("pair", small, teachers=paths, command=["test"])
    assert without_speed(again) == without_speed(report)
    assert [f.name for f in file.parent.iterdir()] == ["report.json"]


def test_figures_equal_those_of_the_whole_logits(small, folders, monkeypatch):
    """Reverse KL and overlap from the logits of whole rows, in numpy."""
    made = []
    real = pair.write
    monkeypatch.setattr(pair, "write", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    report = probe.run("pair", small, command=[])
    rollout = made[0]
    said = []
    for name in ("student", "teacher"):
        model, params = models.load(str(folders / name))
        logits_BTV = np.asarray(
            models.forward(params, model, rollout.tokens_BT, rollout.length_B), np.float64
        )
        # Both end a response of both models: one event, under the id that closes a turn.
        logits_BTV[..., 258] = np.logaddexp(logits_BTV[..., 256], logits_BTV[..., 258])
        logits_BTV = np.delete(logits_BTV, 256, axis=-1)
        said.append(logits_BTV - np.log(np.sum(np.exp(logits_BTV), axis=-1, keepdims=True)))
    kls, overlaps, gaps = [], [], []
    for i in range(7):
        for t in range(int(rollout.prompt_length_B[i]), int(rollout.length_B[i])):
            p, q = said[0][i, t - 1], said[1][i, t - 1]
            kls.append(float(np.sum(np.exp(p) * (p - q))))
            tops = [set(np.argsort(x)[-16:].tolist()) for x in (p, q)]
            overlaps.append(len(tops[0] & tops[1]) / 16)
            gaps.append(abs(np.sum(np.exp(p) * p) - np.sum(np.exp(q) * q)))
    figures = report["teachers"][0]["figures"]
    assert figures["tokens"] == len(kls)
    assert figures["reverse_kl"] == pytest.approx(np.mean(kls), abs=1e-5)
    assert figures["overlap_ratio"] == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert figures["entropy_gap"] == pytest.approx(np.mean(gaps), abs=1e-5)


def test_problems_without_answers_are_measured_but_not_graded(small, tmp_path):
    small.data.train = questions(tmp_path / "open.jsonl", answer="")
    report = probe.run("pair", small, command=[])
    assert "accuracy" not in report["student"]["answers"]
    assert report["teachers"][0]["gain"] is None
    rated = {line["what"]: line["rating"] for line in report["teachers"][0]["verdict"]}
    assert rated["new knowledge"] == "unknown"
    with pytest.raises(DataError, match=r"problem open-\d has no answer, wanted one for every"):
        probe.run("continuation", small, command=[])


def test_continuation_goes_on_behind_the_students_tokens_in_the_teachers_ids(
    small, folders, tmp_path, monkeypatch, capsys
):
    small.teacher.path = str(folders / "other")
    small.probe.depths = (12, 5)
    asked = []
    real = writing.generate

    def listening(params, model, prompts, **settings):
        done = real(params, model, prompts, **settings)
        asked.append((prompts, settings, done))
        return done

    monkeypatch.setattr(writing, "generate", listening)
    out = tmp_path / "report.json"
    report = probe.run("continuation", small, out=str(out), command=["test"])
    made = workload.make_plan(small)
    student = writing.student_writer(made)
    teacher = writing.teacher_writer(made.setups[0], made.problems)
    first = [done for _, _, done in asked[:2]]  # seven rollouts, in two batches of four
    responses = [
        first[i // 4].response(i % 4)
        for i in range(7)
        if first[i // 4].response_length_B[i % 4] > 12
    ]
    which = [i for i in range(7) if first[i // 4].response_length_B[i % 4] > 12]
    assert 2 <= len(which) <= 7
    calls = asked[2:]
    each = -(-len(which) // 4)
    assert len(calls) == 6 * each
    for number, (writer, depth) in enumerate(
        (writer, depth) for writer in (student, teacher) for depth in (0, 5, 12)
    ):
        batches = calls[number * each : (number + 1) * each]
        prompts = [prompt for batch, _, _ in batches for prompt in batch][: len(which)]
        for prompt, problem, response in zip(prompts, which, responses, strict=True):
            own = writer.prompts[problem]
            assert prompt[: len(own)] == own
            behind = prompt[len(own) :]
            assert len(behind) == depth
            texts = [
                tokenizer.hf.convert_ids_to_tokens(ids)
                for tokenizer, ids in (
                    (writer.tokenizer, behind), (student.tokenizer, response[:depth]),
                )
            ]  # fmt: skip
            assert texts[0] == texts[1]
        for _, settings, done in batches:
            assert settings["max_response_tokens"] == 24 - depth
            assert done.tokens_BT.shape[1] == max(map(len, writer.prompts)) + 24
            assert settings["stop_ids"] == writer.stop_ids
    assert [row["depth"] for row in report["depths"]] == [0, 5, 12]
    assert {row["gain"]["count"] for row in report["depths"]} == {len(which)}
    assert report["rollouts_longer_than"]["12"] == len(which)
    cut = [i for i, record in enumerate(report["records"]) if "depths" in record]
    assert cut == which
    record = report["records"][which[0]]
    assert record["depths"].keys() == {"0", "5", "12"}
    assert record["depths"]["12"]["student"]["text"].startswith(
        student.tokenizer.decode(responses[0][:12]).rstrip("�")
    )
    assert 12 < record["depths"]["12"]["teacher"]["length"] <= 24
    said = capsys.readouterr().out
    assert f"{len(which)} of 7 rollouts have more than 12 tokens" in said
    assert report["conclusion"] in said
    assert json.loads(out.read_text())["probe"] == "continuation"


def test_what_only_training_needs_is_not_asked_for(small):
    small.eval.data, small.eval.best, small.guard.action = "tiny:test", "accuracy", "rollback"
    made = workload.make_plan(small)
    assert not made.setups[0].terms.needs_reference
    assert not made.setups[0].terms.needs_golden


def test_no_rollout_is_long_enough(small, monkeypatch):
    small.probe.depths = (23,)
    monkeypatch.setattr(continuation, "long_enough", lambda length_B, depth: [])
    with pytest.raises(DataError, match=r"none of 7 rollouts has more than 23 tokens"):
        probe.run("continuation", small, command=[])


def test_a_teacher_that_is_the_student_with_another_prompt(small, capsys):
    small.teacher.path, small.teacher.follow = "student", "live"
    small.data.teacher_prompt_template = "{problem}{answer}"
    report = probe.run("pair", small, command=[])
    assert report["teachers"][0]["figures"]["reverse_kl"] > 0
    assert "the teacher is shown a prompt of its own" in capsys.readouterr().out


def test_the_last_batch_has_the_shapes_of_the_others(small, monkeypatch):
    sizes = []
    real = writing.generate
    monkeypatch.setattr(
        writing,
        "generate",
        lambda p, m, prompts, **k: sizes.append(len(prompts)) or real(p, m, prompts, **k),
    )
    report = probe.run("pair", small, command=[])
    assert sizes == [4, 4, 4, 4]
    assert len(report["records"]) == 7


# ---- a run's checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A workdir with the steps 2 and 10, at which every weight is 2 and 10 more than at the start."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, (2, 10))
    return folder


@pytest.mark.parametrize(("step", "taken"), [(None, 10), (2, 2)])
def test_the_student_of_a_run(run, step, taken):
    config = opd.get_config()
    config.student.path = "/nowhere"  # the run knows better
    config.scoring.overlap_top_k = 4
    made = workload.make_plan(config, folder=str(run), step=step)
    params, found = workload.load_student(made)
    _, before = models.load(made.config.student.path)
    assert found == taken
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + taken), params, before)


def test_the_config_of_a_run_lacks_what_is_new_and_takes_overrides(run, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    kept = json.loads((run / "config.json").read_text())
    del kept["probe"], kept["rollout"]["slots"]
    kept["rollout"]["temperature"] = 0.5
    kept["scoring"]["mask_first"] = ["<", "think"]
    kept["loss"]["forgotten"] = 1
    kept["teacher"] |= {"path": "/models/student", "follow": "live"}
    (old / "config.json").write_text(json.dumps(kept))
    config = probe.config_of_run(str(old), {"probe.depths": (3, 4), "seed": 7})
    assert config.rollout.temperature == 0.5
    assert config.scoring.mask_first == ("<", "think")
    assert (config.probe.problems, config.probe.depths, config.seed) == (64, (3, 4), 7)
    assert config.teacher.path == "student"  # not the folder that it stood for
    assert "forgotten" not in config.loss
    validate(config)


@pytest.mark.parametrize(
    ("name", "fields", "arguments", "error", "says"),
    [
        ("standalone", {}, {}, ConfigError, "probe 'standalone' is not known"),
        ("continuation", {"probe.depths": (24,)}, {}, ConfigError, "probe.depths holds 24"),
        ("pair", {"probe.depths": (0,)}, {}, ConfigError, "probe.depths=(0,)"),
        ("pair", {"probe.depths": (4, 4)}, {}, ConfigError, "probe.depths=(4, 4)"),
        ("pair", {"probe.depths": ("a",)}, {}, ConfigError, "probe.depths=('a',)"),
        ("pair", {"probe.problems": 0}, {}, ConfigError, "probe.problems=0"),
        ("pair", {"probe.batch": 0}, {}, ConfigError, "probe.batch=0"),
        ("pair", {"teacher.path": ""}, {}, ConfigError, "--config.teacher.path=DIR"),
        ("pair", {}, {"step": 3}, ConfigError, "--workdir=DIR"),
        ("pair", {}, {"folder": "/nowhere"}, WorkdirError, "'/nowhere' does not exist"),
        ("pair", {}, {"teachers": ["/nowhere"]}, OpdError, "'/nowhere' does not exist"),
        ("continuation", {}, {"teachers": ["a", "b"]}, ConfigError, "2 teachers, wanted one"),
        ("pair", {"rollout.max_response_tokens": 41}, {}, ConfigError, "80 positions"),
        ("pair", {"rollout.max_prompt_tokens": 3}, {}, DataError, "max_prompt_tokens="),
        ("pair", {}, {"out": "report.txt"}, ConfigError, "ends in .json"),
        ("pair", {}, {"out": "/dev/null/x.json"}, WorkdirError, "cannot be written"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    small, monkeypatch, name, fields, arguments, error, says
):
    monkeypatch.setattr(runner, "load_student", lambda plan: pytest.fail("weights were read"))
    for field, value in fields.items():
        section, key = field.split(".")
        with small.ignore_type():
            small[section][key] = value
    with pytest.raises(error) as raised:
        probe.run(name, small, command=[], **arguments)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_report_is_not_written_over(small, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("thesis")
    with pytest.raises(WorkdirError, match="exists already"):
        probe.run("pair", small, out=str(file), command=[])
    assert file.read_text() == "thesis"


def test_a_problem_that_a_second_teacher_has_no_room_for_is_named(small, folders, tmp_path):
    """Its template is longer by two letters; its own setup leaves the problem out, the first's not."""
    small.data.train = questions(tmp_path / "mixed.jsonl")
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write(json.dumps({"problem": "7" * 40, "answer": "7"}) + "\n")
    small.rollout.max_prompt_tokens, small.rollout.max_response_tokens = 42, 38
    small.data.bad_rows, small.probe.problems = "skip", 10
    both = [str(folders / "teacher"), str(folders / "other")]
    assert len(workload.make_plan(small, teachers=both[:1]).problems) == 10
    with pytest.raises(DataError, match=r"mixed-10: the teacher's prompt has 44 .*42 .*other\)"):
        workload.make_plan(small, teachers=both)


def test_a_moving_average_of_a_run_is_not_probed(run):
    config = opd.get_config()
    config.teacher.path, config.teacher.follow = "student", "average"
    with pytest.raises(ConfigError, match=r"teacher\.follow=average"):
        workload.make_plan(config, folder=str(run))


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "probe.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "a name is missing, wanted pair or continuation"),
        (["pear"], 2, "did you mean 'pair'?"),
        (["pair", "more"], 2, "got 'more', wanted flags only"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, status, says):
    done = command(*arguments)
    assert done.returncode == status
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_overrides_count_on_top_of_the_config_of_the_run(run):
    """The run has no teacher and 192 tokens; both are told, so its config was read."""
    done = command("continuation", f"--workdir={run}", "--config.probe.depths=5,192")
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")
    assert "teacher.path=''" in done.stderr
    done = command(
        "continuation", f"--workdir={run}", "--config.probe.depths=5,192",
        "--config.teacher.path=student",
    )  # fmt: skip
    assert done.returncode == 1
    assert "probe.depths holds 192, wanted less than rollout.max_response_tokens=192" in done.stderr


@pytest.mark.slow
def test_the_embedded_pair(tmp_path):
    """The teacher is worth training with, and helps less the deeper the student's prefix."""
    report = probe.run("pair", opd.get_config(), command=["test"])
    teacher = report["teachers"][0]
    assert teacher["answers"]["accuracy"] > 0.8 > 0.65 > report["student"]["answers"]["accuracy"]
    assert 0.05 < teacher["figures"]["reverse_kl"] < 0.2
    assert teacher["figures"]["advantage_right"] > teacher["figures"]["advantage_wrong"]
    assert teacher["conclusion"].startswith("Worth training")
    depths = probe.run("continuation", opd.get_config(), command=["test"])["depths"]
    gains = [row["gain"]["value"] for row in depths]
    assert gains[0] > 0.4
    assert gains[0] > gains[-1] + 0.2
    assert depths[-1]["drop"]["value"] < -0.1
