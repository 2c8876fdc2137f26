"""Several teachers in a run: one teacher twice, routed rollouts, waiting teachers, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from opd_jax import scoring, train
from opd_jax.config.validate import validate
from opd_jax.data import Problem
from opd_jax.errors import ConfigError, DataError, ModelError
from opd_jax.tools import record
from opd_jax.training.make_setup import make_setup
from opd_jax.training.other_teachers import names_of, teacher_of
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.teachers import Teachers
from opd_jax.training.weights import load_weights
from opd_jax.types import Rollout
from tests.support.experts import make_expert, of_teachers
from tests.support.small_run import lines, lines_of, small, without_times


@pytest.fixture(scope="module")
def expert(folders, tmp_path_factory) -> pathlib.Path:
    return make_expert(folders, tmp_path_factory.mktemp("expert") / "expert")


def run_of(config, folder) -> tuple[list[dict], object]:
    result = train.run(config, str(folder), command=[])
    return without_times(lines(folder, "metrics.jsonl")), result.state


def equal(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_one_teacher_twice_with_halves_is_that_teacher_bit_for_bit(folders, tmp_path):
    path = folders / "teacher"
    twice = of_teachers(folders, tmp_path, f"again={path}", teachers__weights=(0.5, 0.5))
    alone = of_teachers(folders, tmp_path, "")
    rows, state = run_of(twice, tmp_path / "twice")
    wanted_rows, wanted = run_of(alone, tmp_path / "alone")
    equal(state, wanted)
    assert rows == wanted_rows


def test_routed_rollouts_are_scored_by_the_teacher_that_they_name(folders, tmp_path, expert):
    """As each of the two scores all of them; and the same bits where teachers wait in host memory."""
    setup = make_setup(
        of_teachers(
            folders, tmp_path, f"code={expert}", teachers__column="domain", teachers__first="math"
        )
    )  # fmt: skip
    assert names_of(setup.config) == ("math", "code")
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=True)
    student = functions.compute_weights(weights.student)
    problems = [setup.train[i] for i in range(4)]
    prompts = setup.read(problems).prompts
    rollout = functions.generate(student, [p for p in prompts for _ in range(2)], jax.random.key(0))
    teachers = Teachers(setup, functions, weights)
    teacher_B = teachers.of(problems, group=2)
    assert teacher_B.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    got = teachers.score(student, rollout, None, teacher_B)
    for index in range(2):
        spec = functions.spec.taught_by(index)
        one = dataclasses.replace(functions, spec=spec)
        wanted = one.score(student, weights.scorers[index], rollout)
        own_B = teacher_B == index
        for name in ("teacher_logprob_BT", "reverse_kl_BT", "student_logprob_BT"):
            np.testing.assert_allclose(
                getattr(got, name)[own_B], getattr(wanted, name)[own_B], atol=2e-5
            )
    mask_BT = rollout.response_mask_BT
    row = teachers.metrics(got, mask_BT, teacher_B)
    assert row["teacher/math/rollouts"] == row["teacher/code/rollouts"] == 4
    ratio_BT = got.teacher_logprob_BT - got.student_logprob_BT
    own_BT = mask_BT & (teacher_B == 1)[:, None]
    np.testing.assert_allclose(row["teacher/code/log_ratio"], ratio_BT[own_BT].mean(), rtol=1e-5)
    setup.config.teachers.wait = "host"
    waiting = load_weights(setup, student=False)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(waiting.scorers))
    again = Teachers(setup, functions, waiting).score(student, rollout, None, teacher_B)
    equal(again, got)


def test_no_split_of_the_rollouts_compiles_a_program_that_is_not_listed(folders, tmp_path, expert):
    setup = make_setup(of_teachers(folders, tmp_path, f"code={expert}", teachers__column="domain",
                                    teachers__first="math"))  # fmt: skip
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=True)
    listed = functions.programs(weights.scorer, None, setup.terms.weights, weights.others)
    names = [program.name for program in listed if "score" in program.name]
    assert any("teacher 2" in name for name in names)
    assert len(names) == len(set(names))
    student = functions.compute_weights(weights.student)
    teachers = Teachers(setup, functions, weights)
    tokens_BT = np.full((8, setup.width), 5, np.int32)
    scoring.score_part.clear_cache()
    for seed in range(12):  # lengths and numbers of rows of each teacher
        generator = np.random.default_rng(seed)
        length_B = generator.integers(2, setup.width + 1, 8).astype(np.int32)
        rollout = Rollout(tokens_BT, length_B, length_B // 2, np.zeros(tokens_BT.shape), length_B)
        teacher_B = (generator.uniform(size=8) < generator.uniform()).astype(np.int32)
        teachers.score(student, rollout, None, teacher_B)
    assert scoring.score_part._cache_size() <= len(names)


def test_a_mixture_of_two_is_the_mean_of_their_scores(folders, tmp_path, expert):
    config = of_teachers(folders, tmp_path, f"code={expert}", teachers__weights=(3.0, 1.0))
    setup = make_setup(config)
    assert any("mixed by 3, 1" in note for note in setup.notes)
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=True)
    student = functions.compute_weights(weights.student)
    tokens_BT = np.full((8, setup.width), 5, np.int32)
    length_B = np.full(8, 40, np.int32)
    rollout = Rollout(tokens_BT, length_B, length_B - 20, np.zeros(tokens_BT.shape), length_B)
    got = Teachers(setup, functions, weights).score(student, rollout, None, None)
    each = []
    for index in range(2):
        one = dataclasses.replace(functions, spec=functions.spec.taught_by(index))
        each.append(one.score(student, weights.scorers[index], rollout))
    for name in ("teacher_logprob_BT", "reverse_kl_BT"):
        wanted = 0.75 * getattr(each[0], name) + 0.25 * getattr(each[1], name)
        np.testing.assert_allclose(getattr(got, name), wanted, atol=1e-6)
    equal(got.student_logprob_BT, each[0].student_logprob_BT)


@pytest.mark.slow
def test_a_run_with_routes_resumes_to_the_same_bits(folders, tmp_path, expert):
    fields = {"teachers__column": "domain", "teachers__first": "math", "teachers__wait": "host"}
    config = of_teachers(folders, tmp_path, f"code={expert}", **fields)
    config.checkpoint.every = 1
    rows, state = run_of(config, tmp_path / "whole")
    assert {"teacher/math/rollouts", "teacher/code/log_ratio"} <= rows[1].keys()
    config.steps = 2
    run_of(config, tmp_path / "parts")
    config.steps = 3
    again, resumed = run_of(config, tmp_path / "parts")
    equal(resumed, state)
    assert again == rows


@pytest.mark.slow
def test_routes_with_a_support_train(folders, tmp_path, expert):
    """Divergences on rollouts and on golden solutions, over ids of each row's own teacher."""
    config = of_teachers(
        folders, tmp_path, f"code={expert}", teachers__column="domain", teachers__first="math",
        loss__divergence_weight=1.0, loss__support="teacher", loss__golden_divergence=1.0,
        loss__golden_support="teacher", loss__direction="forward",
    )  # fmt: skip
    file = pathlib.Path(config.data.train)
    rows = lines_of(file)
    for row in rows:
        row["solution"] = f"It is {row['answer']}."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.steps = 1
    rows, _ = run_of(config, tmp_path / "run")
    assert rows[-1]["loss/divergence"] > 0
    assert rows[-1]["loss/golden_divergence"] > 0


MIX = {"teachers.others": "b=B", "teachers.weights": (1.0, 1.0)}
ROUTE = {"teachers.others": "b=B", "teachers.column": "domain"}


@pytest.mark.short
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"teachers.others": "B"}, "'B' is no NAME=PATH"),
        ({"teachers.others": "b=B,b=C"}, "two teachers have the name 'b'"),
        ({"teachers.others": "b="}, "is no NAME=PATH"),
        ({"teachers.column": "x"}, "has no effect: there is one teacher"),
        ({"teachers.weights": (1.0,)}, "has no effect: there is one teacher"),
        ({"teachers.wait": "host"}, "has no effect: there is one teacher"),
        ({"teachers.others": "b=B"}, "with neither teachers.column nor teachers.weights"),
        (MIX | {"teachers.column": "domain"}, "wanted one of them"),
        (MIX | {"lora.rank": 4}, "adapters beside several teachers are not built"),
        (MIX | {"teachers.weights": (1.0,)}, "has 1 numbers, wanted 2"),
        (MIX | {"teachers.weights": (1.0, -1.0)}, "finite numbers, at least 0"),
        (MIX | {"teachers.weights": (0.0, 0.0)}, "not all 0"),
        (MIX | {"teachers.weights": (1.0, float("nan"))}, "finite numbers"),
        (MIX | {"teachers.first": "b"}, "is the name of one of teachers.others"),
        (MIX | {"teachers.first": "a b"}, "a name without spaces"),
        (MIX | {"loss.divergence_weight": 1.0, "loss.support": "teacher"},
         "a mixture of teachers has no probabilities"),
        (MIX | {"loss.advantage": "support", "loss.support": "student"}, "has no probabilities"),
        (MIX | {"loss.advantage_shape": "power", "loss.advantage_shape_value": 1.0},
         "has no probabilities"),
        (MIX | {"loss.advantage_shape": "f_jsd"}, "has no probabilities"),
        (MIX | {"log.variants": 5}, "has no probabilities"),
        (ROUTE | {"loss.divergence_weight": 1.0}, "the output matrix of every teacher"),
        (ROUTE | {"loss.golden_divergence": 1.0}, "the output matrix of every teacher"),
        (ROUTE | {"loss.pg_weight": 0.0, "loss.lambda_gold": 1.0}, "no term of this loss reads"),
        (ROUTE | {"teacher.path": "student", "teacher.follow": "live"}, "teachers that do not"),
        (ROUTE | {"scoring.compare": "spans"}, "share the student's ids"),
        (ROUTE | {"replay.path": "X"}, "more than the one teacher of a recording"),
    ],
)  # fmt: skip
def test_teachers_that_are_refused_before_anything_is_read(folders, fields, says):
    config = small(folders, "opd")
    for name, value in fields.items():
        section, _, field = name.partition(".")
        config[section][field] = value
    with pytest.raises(ConfigError, match=says) as raised:
        validate(config)
    assert "\n" not in str(raised.value)


@pytest.mark.short
def test_the_teacher_of_a_row():
    def of(**fields) -> int | str:
        return teacher_of(Problem("p", "x", "", "", fields=fields), "of.domain", ("math", "code"))

    assert of(of={"domain": "code"}) == 1
    assert of(of={"domain": " math "}) == 0
    assert "holds 'law', wanted the name of a teacher (math, code)" in of(of={"domain": "law"})
    assert "is not there" in of(domain="math")
    assert "is not there, or no text" in of(of={"domain": None})


def test_rows_without_a_teacher_are_refused_or_left_out(folders, tmp_path, expert):
    config = of_teachers(folders, tmp_path, f"law={expert}", teachers__column="domain")
    config.teachers.first = "math"
    with pytest.raises(DataError, match=r"holds 'code', wanted the name of a teacher") as raised:
        make_setup(config)
    assert "\n" not in str(raised.value)
    config.data.bad_rows = "skip"
    setup = make_setup(config)
    assert len(setup.train) == 12
    assert any("no teacher 12" in note for note in setup.notes)
    config.teachers.column = "field"
    config.data.bad_rows = "refuse"
    with pytest.raises(DataError, match=r"teachers\.column=field is not there"):
        make_setup(config)
    config.data.train = "tiny:train"
    with pytest.raises(ConfigError, match="whose problems have no columns"):
        make_setup(config)


def with_tokens(expert, folder, change) -> str:
    shutil.copytree(expert, folder)
    change(folder)
    return str(folder)


def test_teachers_that_read_otherwise_are_refused(folders, tmp_path, expert):
    def template(folder):
        file = folder / "chat_template.jinja"
        file.write_text("Q: " + file.read_text())

    def vocabulary(folder):
        file = folder / "tokenizer.json"
        fields = json.loads(file.read_text())
        known = fields["model"]["vocab"]
        ordinary = [name for name in known if name.isalpha()][:2]
        known[ordinary[0]], known[ordinary[1]] = known[ordinary[1]], known[ordinary[0]]
        file.write_text(json.dumps(fields))

    for change, says in ((template, "chat template of the teacher 'code'"),
                         (vocabulary, "another vocabulary than the student")):  # fmt: skip
        path = with_tokens(expert, tmp_path / change.__name__, change)
        config = of_teachers(folders, tmp_path, f"code={path}", teachers__weights=(1.0, 1.0))
        with pytest.raises(ModelError, match=says) as raised:
            make_setup(config)
        assert "\n" not in str(raised.value)


def test_a_recording_of_several_teachers_is_refused(folders, tmp_path, expert):
    config = of_teachers(folders, tmp_path, f"code={expert}", teachers__weights=(1.0, 1.0))
    with pytest.raises(ConfigError, match="more than the one teacher of a recording"):
        record.run(config, str(tmp_path / "out"))
