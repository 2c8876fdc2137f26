"""Whole runs on random models that a test can afford: files, keys, resume, outcomes of methods."""

import dataclasses
import html
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import opsd, recipes
from launch.make_tiny import make_tokenizer
from opd_jax import config as configuration
from opd_jax import data, models, train, workdir
from opd_jax.errors import ConfigError, DataError, ModelError, NonFiniteError, WorkdirError
from opd_jax.eval import Grade
from opd_jax.eval.grade import Grader
from opd_jax.models import decoder
from opd_jax.report import run as report
from opd_jax.report.text import clean
from opd_jax.setup import make_setup
from tests import bench_metrics
from tests.test_living import scalars

METHODS = {"opd": (1.0, 0.0, 0.0), "stable_opd": (1.0, 0.1, 0.05), "sft": (0.0, 1.0, 0.0)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """Folders `student` and `teacher`: random weights, the tokenizer of the embedded models."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for seed, (name, width) in enumerate({"student": 16, "teacher": 32}.items()):
        model = models.ModelConfig(
            model_type="qwen2", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32,
            num_layers=2, num_heads=2, num_kv_heads=1, head_dim=width // 2, rope_theta=1e4,
            rms_norm_eps=1e-6, max_position=160, tie_embeddings=True, qkv_bias=True, qk_norm=False,
            eos_token_ids=(tokenizer.eos_token_id,),
        )  # fmt: skip
        models.save(str(root / name), model, decoder.init(jax.random.key(seed), model), tokenizer)
    return root


def small(folders: pathlib.Path, method: str = "stable_opd"):
    """A run of seconds: 4 prompts x 2 rollouts of 124 tokens at most."""
    config = configuration.default()
    config.student.path = str(folders / "student")
    config.teacher.path = str(folders / "teacher")
    config.steps = 4
    config.rollout.prompts_per_step = 4
    config.data.size = 256  # problems; longer ones come later
    config.rollout.samples_per_prompt = 2
    config.rollout.max_prompt_tokens = 36
    config.rollout.max_response_tokens = 124
    config.scoring.token_chunk = config.optim.token_chunk = 256
    config.loss.pg_weight, config.loss.lambda_gold, config.loss.beta_kl = METHODS[method]
    config.optim.learning_rate = 1e-2
    config.optim.microbatch_tokens = 640
    config.checkpoint.every = 2
    config.eval.problems = 4
    config.metrics.repetition_tail = 20
    config.metrics.repetition_threshold = 2.0
    config.metrics.positions = (16, 64, 1000)
    return config


def lines(workdir: pathlib.Path, name: str) -> list[dict]:
    return lines_of(workdir / name)


def lines_of(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def without_times(rows: list[dict]) -> list[dict]:
    drop = ("time/", "speed/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows]


@pytest.fixture(scope="module")
def straight(folders, tmp_path_factory):
    """Four steps of Stable-OPD in one go."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    config = small(folders)
    config.log.tensorboard = True
    return train.run(config, str(workdir), command=["test"]), workdir


@pytest.mark.short
def test_run_writes_what_the_design_promises(straight):
    result, workdir = straight
    assert json.loads((workdir / "config.json").read_text())["steps"] == 4
    run = json.loads((workdir / "run.json").read_text())
    assert run["command"] == ["test"]
    assert run["packages"]["jax"] == jax.__version__
    rows = lines(workdir, "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    promised = {
        "loss": "total opd sft reference_kl", "optim": "grad_norm learning_rate",
        "rollout": "truncation_rate repetition_rate length_mean length_max tokens "
                   "sampler_logprob_gap_max sampler_logprob_gap_mean",
        "score": "advantage_mean student_logprob_mean teacher_logprob_mean reverse_kl "
                 "student_entropy teacher_entropy entropy_gap overlap_ratio overlap_advantage "
                 "student_overlap_mass teacher_overlap_mass repeated_token_fraction "
                 "regular_token_advantage hedging_rate extreme_probability_difference",
        "score/first_16": "advantage_mean reverse_kl student_entropy teacher_entropy "
                          "overlap_ratio",
        "score/first_64": "reverse_kl",
        "rollout/first_16": "tokens",
        "time": "rollout_s score_s update_s step_s",
        "speed": "rollout_tokens_per_s score_tokens_per_s update_tokens_per_s",
        "memory": "peak_gib",
    }  # fmt: skip
    keys = {f"{room}/{name}" for room, names in promised.items() for name in names.split()}
    assert keys <= rows[1].keys()
    assert not [key for key in rows[1] if "first_1000" in key]  # more than the budget
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["rollout/sampler_logprob_gap_max"] < 1e-4
    evaluated = "accuracy stderr truncation_rate repetition_rate length_mean unparsed timeouts"
    for row in (rows[0], rows[4]):
        assert {f"eval/tiny/{name}" for name in evaluated.split()} <= row.keys()
    sample = lines(workdir, "rollouts.jsonl")[0]
    tokens = len(sample["response_ids"])
    assert tokens == len(sample["advantage"]) == len(sample["sampler_logprob"])
    assert len(lines(workdir / "eval" / "4", "tiny.jsonl")) == 4
    assert set(result.table) == {"student before", "student after", "teacher"}


@pytest.mark.short
def test_tensorboard_has_every_figure_of_the_log(straight):
    _, workdir = straight
    found = scalars(workdir / "tensorboard")
    for row in lines(workdir, "metrics.jsonl"):
        for key in row.keys() - {"step"}:
            assert found[key][row["step"]] == pytest.approx(row[key], rel=1e-6), key


@pytest.mark.short
def test_a_real_run_is_reported(straight, tmp_path, capsys):
    _, workdir = straight
    report.run([str(workdir)], out=str(tmp_path / "report.html"), text=True)
    assert "Too short to judge: 4 steps with rollouts." in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for text in ("TruncRate of rollouts", "Accuracy, tiny", "Student&#x27;s log-prob", "Overlap of the top-k",
                 "A: overlap by position", "A: seconds of a step by stage", "before (step 0)",
                 "after (step 4)", "teacher", "step 4, "):  # fmt: skip
        assert text in page, text
    shown = re.sub("<[^>]+>", "", page[page.index('<pre class="tokens"') :].partition("</pre>")[0])
    response = lines(workdir, "rollouts.jsonl")[0]["response"]
    assert html.unescape(shown).removesuffix("⟨end⟩").replace("▫", "") == clean(response)


@pytest.mark.short
@pytest.mark.parametrize("rule", ["tail", "ngram"])
def test_what_is_not_correct_counts_as_wrong(rule):
    collector, rollout, scores, _ = bench_metrics.prepare(
        "tiny", data.Tokenizer(recipes.recipe("tiny").student.path), rows=4, tokens=120
    )
    collector.config.metrics.repeated_tokens = rule
    grades = [Grade.CORRECT, Grade.WRONG, Grade.UNPARSED, Grade.TIMEOUT]
    row = bench_metrics.measure(collector, rollout, scores, grades)
    mask_BT = rollout.response_mask_BT
    advantage_BT = scores.teacher_logprob_BT - scores.student_logprob_BT
    reward_B = [advantage_BT[i][mask_BT[i]].mean() for i in range(4)]
    assert row["rollout/accuracy"] == 0.25
    assert row["score/reward_right"] == pytest.approx(reward_B[0], rel=1e-5)
    assert row["score/reward_wrong"] == pytest.approx(np.mean(reward_B[1:]), rel=1e-5)
    assert 0 < row["score/repeated_token_fraction"] < 1
    ungraded = bench_metrics.measure(collector, rollout, scores, None)
    new = {"rollout/accuracy", "score/reward_right", "score/reward_wrong", "score/reward_auroc"}
    assert row.keys() - ungraded.keys() == new


def test_four_steps_equal_two_and_a_resume_and_two_bit_for_bit(straight, folders, tmp_path):
    result, workdir = straight
    config = small(folders)
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    resumed = train.run(config, str(tmp_path / "run"), command=[])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, result.state)
    again = without_times(lines(tmp_path / "run", "metrics.jsonl"))
    for row in again:  # the run of two steps was evaluated at its own end
        if row["step"] == 2:
            for key in [key for key in row if key.startswith("eval/")]:
                del row[key]
    assert again == without_times(lines(workdir, "metrics.jsonl"))
    assert lines(tmp_path / "run", "rollouts.jsonl") == lines(workdir, "rollouts.jsonl")


def test_lines_after_the_checkpoint_and_torn_ones_are_cut_on_resume(folders, tmp_path):
    config = small(folders, "sft")
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/total": 1.0}\n{"step": 4, "lo')
    config.steps = 3
    train.run(config, str(tmp_path / "run"), command=[])
    assert [row["step"] for row in lines(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2, 3]


def test_evaluation_on_the_way_changes_nothing(straight, folders, tmp_path):
    result, _ = straight
    config = small(folders)
    config.eval.every = 1
    config.eval.problems = 2
    other = train.run(config, str(tmp_path / "run"), command=[])
    jax.tree.map(np.testing.assert_array_equal, other.state, result.state)


def test_answers_to_held_out_problems_have_a_budget_of_their_own(folders, tmp_path):
    config = small(folders, "opd")
    config.steps, config.rollout.max_response_tokens = 1, 40
    short = train.run(config, str(tmp_path / "short"), command=[])
    config.eval.max_response_tokens, config.eval.slots = 100, 3
    long = train.run(config, str(tmp_path / "long"), command=[])
    jax.tree.map(np.testing.assert_array_equal, long.state, short.state)
    longest = [
        max(row["length"] for row in lines(tmp_path / run / "eval" / "0", "tiny.jsonl"))
        for run in ("short", "long")
    ]
    assert longest[0] <= 40 < longest[1] <= 100
    assert max(len(row["response_ids"]) for row in lines(tmp_path / "long", "rollouts.jsonl")) <= 40
    config.eval.max_response_tokens = 125
    with pytest.raises(ConfigError, match=r"student's 160 positions; .*max_response_tokens=124"):
        make_setup(config)


def test_sft_makes_no_rollouts_and_learns(folders, tmp_path):
    config = small(folders, "sft")
    config.teacher.path = ""
    config.steps = 12
    result = train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert "rollout/tokens" not in rows[1]
    assert rows[-1]["loss/sft"] < 0.8 * rows[1]["loss/sft"]
    assert set(result.table) == {"student before", "student after"}


def test_teacher_equal_to_student_leaves_the_student_where_it_is(folders, tmp_path):
    config = small(folders, "opd")
    config.teacher.path = config.student.path
    config.steps = 1
    result = train.run(config, str(tmp_path / "run"), command=[])
    row = lines(tmp_path / "run", "metrics.jsonl")[1]
    assert row["score/advantage_mean"] == 0.0
    assert row["score/reverse_kl"] == 0.0
    assert row["optim/grad_norm"] == 0.0
    _, before = models.load(config.student.path)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, before)


def questions(folder: pathlib.Path, count: int = 12, **more: object) -> str:
    """A file of problems without solutions or answers."""
    rows = [{"problem": f"Start with {i}, add 2.", **more} for i in range(count)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def self_distillation(folders, tmp_path, follow: str):
    config = small(folders, "opd")
    config.teacher.path = "student"
    config.teacher.follow = follow
    config.teacher.decay = 0.5
    config.data.teacher_system_prompt = "Add."
    config.data.train = config.eval.data = questions(tmp_path)
    config.eval.match = "[0-9a-z]"
    config.rollout.max_response_tokens = 20
    config.steps = 2
    return config


@pytest.mark.parametrize("follow", ["frozen", "average", "live"])
def test_self_distillation_on_a_file_of_questions(folders, tmp_path, follow, capsys):
    config = self_distillation(folders, tmp_path, follow)
    result = train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert rows[1]["score/advantage_mean"] != 0.0  # another prompt, another distribution
    assert {"eval/questions/matched", "eval/questions/length_mean"} <= rows[0].keys()
    assert "eval/questions/accuracy" not in rows[0]  # nothing to hold an answer against
    assert set(result.table) == {"student before", "student after", "teacher"}
    said = capsys.readouterr().out
    assert "12 problems of 12 rows" in said
    assert "answers that match" in said
    if follow == "average":
        assert result.state.average is not None
        config.steps = 4
        resumed = train.run(config, str(tmp_path / "run"), command=[])
        straight = train.run(config, str(tmp_path / "straight"), command=[])
        jax.tree.map(np.testing.assert_array_equal, resumed.state, straight.state)
    else:
        assert result.state.average is None


@pytest.mark.parametrize("follow", ["frozen", "live"])
def test_divergence_from_a_teacher_with_another_prompt(folders, tmp_path, follow):
    """Full-vocabulary JSD in place of the policy gradient, two updates a rollout."""
    config = self_distillation(folders, tmp_path, follow)
    config.loss.pg_weight, config.loss.divergence_weight = 0.0, 1.0
    config.loss.direction = "jsd"
    config.optim.updates_per_rollout = 2
    config.eval.teacher = False
    result = train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert int(result.state.step) == 4
    assert all(row["loss/divergence"] > 0 for row in rows[1:])
    assert rows[1]["loss/total"] == rows[1]["loss/divergence"]
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_a_live_teacher_with_the_students_prompt_has_nothing_to_say(folders, tmp_path):
    config = self_distillation(folders, tmp_path, "live")
    config.data.teacher_system_prompt = "same"
    train.run(config, str(tmp_path / "run"), command=[])
    for row in lines(tmp_path / "run", "metrics.jsonl")[1:]:
        assert row["score/advantage_mean"] == row["optim/grad_norm"] == 0.0


def test_a_divergence_over_a_support_in_two_updates_a_rollout(folders, tmp_path):
    config = small(folders, "opd")
    config.steps, config.eval.data = 2, ""
    config.loss.update({"pg_weight": 0.0, "divergence_weight": 1.0, "support": "union", "top_k": 4})
    config.loss.form = "tail"
    config.optim.updates_per_rollout = 2
    config.log.gradients = 1  # one term: nothing to compare it with
    train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")[1:]
    assert rows[0]["loss/total"] == rows[0]["loss/divergence"] > 0
    assert not any(key.startswith("optim/grad_cosine") for row in rows for key in row)
    # Of nearly uniform models 4 ids and the rest hold less than all of the divergence.
    assert rows[0]["loss/divergence"] < rows[0]["score/reverse_kl"]


def test_grpo_has_no_teacher_and_learns_from_grades(folders, tmp_path, monkeypatch):
    config = small(folders, "opd")
    config.steps, config.eval.data, config.teacher.path = 2, "", ""
    config.loss.teacher_coef, config.loss.group_coef = 0.0, 1.0
    train.run(config, str(tmp_path / "wrong"), command=[])
    (row, _) = rows = lines(tmp_path / "wrong", "metrics.jsonl")[1:]
    assert row["rollout/accuracy"] == row["loss/opd"] == row["optim/grad_norm"] == 0.0  # all wrong
    assert not any("teacher" in key or "overlap" in key for row in rows for key in row)
    assert "score/student_entropy" in row
    sample = lines(tmp_path / "wrong", "rollouts.jsonl")[0]
    assert sample["correct"] is False
    assert "teacher_logprob" not in sample
    every_other = [Grade.CORRECT, Grade.WRONG] * 4
    monkeypatch.setattr(Grader, "grade", lambda self, pairs: every_other)
    train.run(config, str(tmp_path / "half"), command=[])
    row = lines(tmp_path / "half", "metrics.jsonl")[1]
    assert row["rollout/accuracy"] == 0.5
    assert row["optim/grad_norm"] > 0
    # Ratio 1: the loss is minus the mean advantage, and each pair's (1, 0) gives +-0.707.
    np.testing.assert_allclose(row["loss/opd"], 0.0, atol=1e-5)
    signs = [np.sign(line["advantage"][0]) for line in lines(tmp_path / "half", "rollouts.jsonl")]
    assert signs == [1.0, 1.0]


def test_gradients_of_the_terms_are_logged_now_and_then(folders, tmp_path):
    config = small(folders)
    config.steps, config.eval.data, config.log.gradients = 2, "", 2
    train.run(config, str(tmp_path / "run"), command=[])
    _, first, second = lines(tmp_path / "run", "metrics.jsonl")
    names = {"opd", "reference_kl", "sft"}
    norms = {f"optim/grad_norm_{name}" for name in names}
    assert not norms & first.keys()
    assert norms <= second.keys()
    assert second["optim/grad_norm"] <= sum(second[key] for key in norms) + 1e-6
    cosines = [value for key, value in second.items() if key.startswith("optim/grad_cosine_")]
    assert len(cosines) == 3
    assert all(-1 <= value <= 1 for value in cosines)
    config.log.gradients = 0
    train.run(config, str(tmp_path / "plain"), command=[])
    plain = lines(tmp_path / "plain", "metrics.jsonl")[2]
    assert plain["loss/total"] == second["loss/total"]  # looking changes nothing
    assert plain["optim/grad_norm"] == second["optim/grad_norm"]


def test_a_run_without_held_out_data_measures_none(folders, tmp_path, capsys):
    config = small(folders, "sft")
    config.eval.data = ""
    config.steps = 1
    assert train.run(config, str(tmp_path / "run"), command=[]).table == {}
    assert not (tmp_path / "run" / "eval").exists()
    assert "accuracy" not in capsys.readouterr().out


def test_rows_that_do_not_fit_are_skipped_and_counted_where_the_config_says_so(
    folders, tmp_path, capsys
):
    file = pathlib.Path(questions(tmp_path, solution="1+2=3.\n\\boxed{3}"))
    bad = [
        {"problem": "Add 1. " * 40, "solution": "x"},
        {"problem": "Add 1.", "solution": "7" * 200},
    ]
    with file.open("a") as out:
        out.write("".join(json.dumps(row) + "\n" for row in bad) + "{broken\n")
    config = small(folders, "sft")
    config.data.train, config.eval.data, config.steps = str(file), "", 1
    with pytest.raises(DataError, match=r"questions\.jsonl, line 15, .*bad_rows=skip"):
        train.run(config, str(tmp_path / "run"), command=[])
    config.data.bad_rows = "skip"
    train.run(config, str(tmp_path / "run"), command=[])
    said = capsys.readouterr().out
    assert "12 problems of 15 rows" in said
    for reason in ("prompt too long 1", "golden solution too long 1"):
        assert reason in said
    config.data.bad_rows = "refuse"
    file.write_text(file.read_text().replace("{broken\n", ""))
    with pytest.raises(DataError, match=r"problem questions-13: its prompt has \d+ tokens, wanted"):
        train.run(config, str(tmp_path / "other"), command=[])


def test_every_generated_solution_is_looked_at(folders):
    """Prompts of generated problems are all alike, but not how long their solutions are."""
    config = small(folders, "sft")
    config.data.size, config.data.bad_rows = 6_000, "skip"
    config.rollout.max_response_tokens = 124 - 1
    setup = make_setup(config)
    asked = data.open_problems("tiny:train", field="data.train", size=6_000)[:]
    batch = setup.read(asked)
    sizes = [len(x) + len(y) for x, y in zip(batch.prompts, batch.golden, strict=True)]
    wrong = [i for i, size in enumerate(sizes) if size > 159]
    assert wrong
    assert max(wrong) > 2048
    assert f"golden solution too long {len(wrong)}" in "".join(setup.notes)


def test_epochs_set_the_steps(folders, tmp_path):
    config = small(folders, "sft")
    config.data.train = questions(tmp_path, count=10, solution="1+2=3.\n\\boxed{3}")
    config.data.epochs, config.eval.data = 0.8, ""
    result = train.run(config, str(tmp_path / "run"), command=[])  # 8 problems, 4 a step
    assert int(result.state.step) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 2


def test_several_updates_a_rollout(folders, tmp_path):
    config = small(folders)
    config.optim.updates_per_rollout = 2
    config.optim.schedule = "linear"
    config.steps = 2
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert int(result.state.step) == 4
    # 4 updates down to 0: rates 1, 3/4, 1/2, 1/4 of 0.01, of which the second and the last are logged
    rates = [row["optim/learning_rate"] for row in lines(tmp_path / "run", "metrics.jsonl")[1:]]
    assert rates == pytest.approx([0.0075, 0.0025])


def test_a_teacher_with_fewer_rows_than_the_student_has_ids(folders, tmp_path):
    """The student's tokenizer has one token more, which the teacher cannot write or read."""
    student = tmp_path / "student"
    model, params = models.load(str(folders / "student"))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    wider = dataclasses.replace(model, vocab_size=model.vocab_size + 1)
    row = params["embed"]["embedding"][:1]
    params["embed"]["embedding"] = jnp.concatenate([params["embed"]["embedding"], row])
    models.save(str(student), wider, params, tokenizer)
    config = small(folders)
    config.student.path = str(student)
    config.steps = 1
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert set(result.table) == {"student before", "student after", "teacher"}
    assert np.isfinite(lines(tmp_path / "run", "metrics.jsonl")[1]["score/reverse_kl"])


def test_what_an_earlier_part_did_not_measure_is_measured_at_the_end(folders, tmp_path):
    config = small(folders, "sft")
    config.steps, config.eval.data = 2, ""
    train.run(config, str(tmp_path / "run"), command=[])
    config.eval.data, config.eval.match = "tiny:test", "[0-9]"
    table = train.run(config, str(tmp_path / "run"), command=[]).table
    assert table.keys() == {"student after"}
    assert "matched" in table["student after"]


def test_a_line_may_hold_any_character(folders, tmp_path):
    file = tmp_path / "lines.jsonl"
    log = workdir.Lines(file, resume_step=-1)
    rows = [{"step": 1, "text": "a\u2028b\u0085c"}, {"step": 2, "text": "d"}]
    for row in rows:
        log.write(row)
    log.close()
    workdir.Lines(file, resume_step=2).close()
    assert lines_of(file) == rows


def test_the_default_self_distillation_starts():
    setup = make_setup(opsd.get_config())
    assert setup.separate_prompts
    assert setup.teacher_width > setup.width


def test_non_finite_numbers_stop_the_run(folders, tmp_path):
    config = small(folders, "sft")
    config.optim.learning_rate = 1e30
    with pytest.raises(NonFiniteError, match=r"step \d.*learning_rate"):
        train.run(config, str(tmp_path / "run"), command=[])


def test_fewer_steps_than_are_done_is_refused(straight, folders):
    _, workdir = straight
    config = small(folders)
    config.steps = 3
    with pytest.raises(ConfigError, match=r"steps=3, but .* is at step 4; set --config.steps=4"):
        train.run(config, str(workdir), command=["test"])
    config.steps = 4  # the refused command has changed nothing that the run needs
    assert set(train.run(config, str(workdir), command=["test"]).table) >= {"student after"}


def test_another_config_in_the_workdir_is_refused(straight, folders):
    _, workdir = straight
    config = small(folders)
    config.loss.beta_kl = 0.5
    with pytest.raises(WorkdirError, match=r"loss.beta_kl: 0.05 there, 0.5 now"):
        train.run(config, str(workdir), command=[])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rollout.max_prompt_tokens": 8}, DataError, "max_prompt_tokens=2"),
        ({"rollout.max_response_tokens": 1000}, ConfigError, "160 positions"),
        ({"scoring.overlap_top_k": 5000}, ConfigError, "overlap_top_k"),
        ({"student.path": "nowhere"}, ModelError, "nowhere"),
        ({"teacher.path": "nowhere"}, ModelError, "nowhere"),
        ({"data.train": "tiny:trian"}, ConfigError, "tiny:train"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folders, tmp_path, change, error, says):
    config = small(folders)
    config.optim.microbatch_tokens = 2000
    for field, value in change.items():
        section, name = field.split(".")
        config[section][name] = value
    with pytest.raises(error, match=says) as raised:
        train.run(config, str(tmp_path / "run"), command=[])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def broken(folders, tmp_path, kind: str) -> str:
    """A student folder in which one thing is wrong."""
    folder = tmp_path / "student"
    shutil.copytree(folders / "student", folder)
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "nan":
        tensors = {name: np.array(x) for name, x in load_file(weights).items()}
        tensors["model.norm.weight"][3] = np.nan
        save_file(tensors, weights)
    elif kind == "shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "end":  # nor does a chat template say how a turn ends
        (folder / "chat_template.jinja").unlink()
        for name in ("config.json", "generation_config.json"):
            fields = json.loads((folder / name).read_text())
            fields["eos_token_id"] = None
            (folder / name).write_text(json.dumps(fields))
    elif kind == "architecture":
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"model_type": "mamba"}))
    elif kind == "template":
        (folder / "chat_template.jinja").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", r"model\.safetensors: not a readable safetensors file"),
        ("nan", r"model\.safetensors: model\.norm\.weight holds NaN or infinity"),
        ("shard", r"shard 'model-00001-of-00002\.safetensors' is not in the folder"),
        ("end", r"no eos_token_id in config\.json or generation_config\.json"),
        ("architecture", r"config\.json: model_type is 'mamba'"),
        ("template", r"no chat template, wanted one for the system prompt"),
    ],
)
def test_a_broken_model_folder_is_named_before_anything_is_written(folders, tmp_path, kind, says):
    config = small(folders, "sft")
    config.student.path = broken(folders, tmp_path, kind)
    config.data.system_prompt = "Add." if kind == "template" else ""
    with pytest.raises(ModelError, match=says) as raised:
        train.run(config, str(tmp_path / "run"), command=[])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_workdirs_that_cannot_be_used(folders, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(WorkdirError, match="not a folder"):
        train.run(small(folders), str(file / "run"), command=[])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(WorkdirError, match="not empty"):
        train.run(small(folders), str(other), command=[])
    assert [f.name for f in other.iterdir()] == ["thesis.tex"]
