"""Runs that train adapters: their start, resume, what they hold, one base for all roles, export."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import checkpoint, models, train
from opd_jax.checkpoint.export import export, export_adapters
from opd_jax.errors import ConfigError, ModelError, WorkdirError
from opd_jax.models import hf_adapters, low_rank
from opd_jax.training.make_setup import make_setup
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.weights import load_weights
from tests.support.lanes import slow
from tests.support.small_run import lines, small, without_times


def with_adapters(folders, method: str = "stable_opd"):
    config = small(folders, method)
    config.lora.rank, config.lora.alpha = 4, 8.0
    return config


def load(path) -> models.Params:
    return models.load(str(path), dtype=np.float32)[1]


@pytest.fixture(scope="module")
def straight(folders, tmp_path_factory):
    """Four steps of Stable-OPD in one go."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return train.run(with_adapters(folders), str(workdir), command=[]), workdir


def test_only_adapters_are_trained_and_saved(straight, folders):
    result, workdir = straight
    adapters = result.state.params
    assert set(adapters) == {"layers"}
    assert set(adapters["layers"]["query"]) == {"lora_a", "lora_b"}
    assert all(np.abs(pair["lora_b"]).max() > 0 for pair in adapters["layers"].values())
    size = checkpoint.bytes_of(result.state)
    assert size == 3 * checkpoint.bytes_of(adapters) + 3 * 4  # masters, two moments, three counts
    assert size < checkpoint.bytes_of(load(folders / "student")) * 3
    rows = lines(workdir, "metrics.jsonl")
    assert abs(rows[1]["loss/reference_kl"]) < 1e-7  # the first student is its reference
    assert rows[4]["loss/reference_kl"] > 1e-6
    assert all(row["rollout/sampler_logprob_gap_max"] < 1e-4 for row in rows[1:])


@pytest.mark.slow
def test_four_steps_equal_two_and_a_resume_and_two_bit_for_bit(straight, folders, tmp_path):
    result, workdir = straight
    config = with_adapters(folders)
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    resumed = train.run(config, str(tmp_path / "run"), command=[])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, result.state)
    again = without_times(lines(tmp_path / "run", "metrics.jsonl"))
    assert again[-1] == without_times(lines(workdir, "metrics.jsonl"))[-1]


def test_another_base_is_refused_at_a_resume_and_at_an_export(straight, folders, tmp_path):
    _, workdir = straight
    shutil.copytree(workdir, tmp_path / "run")
    moved = tmp_path / "student"
    shutil.copytree(folders / "student", moved)
    file = tmp_path / "run" / "config.json"
    kept = json.loads(file.read_text())
    kept["student"]["path"] = kept["reference"]["path"] = str(moved)
    file.write_text(json.dumps(kept | {"steps": 6}))
    export(str(tmp_path / "run"), str(tmp_path / "same"))  # a copy of the base is the base
    config_of, params = models.load(str(moved))
    shutil.rmtree(moved)
    models.save(
        str(moved),
        config_of,
        jax.tree.map(lambda w: w + 1, params),
        source=str(folders / "student"),
    )
    with pytest.raises(WorkdirError, match="adapters belong to a base with the hash") as caught:
        export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    config = with_adapters(folders)
    config.steps, config.student.path, config.reference.path = 6, str(moved), str(moved)
    with pytest.raises(WorkdirError, match="restore the model folder that the run started"):
        train.run(config, str(tmp_path / "run"), command=[])


def test_export_of_the_merged_model_and_of_the_adapters(straight, folders, tmp_path):
    result, workdir = straight
    assert export(str(workdir), str(tmp_path / "merged")) == 4
    assert export_adapters(str(workdir), str(tmp_path / "adapters"), step=4) == 4
    merged = load(tmp_path / "merged")
    wanted = low_rank.merge(low_rank.join(load(folders / "student"), result.state.params), 2.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, wanted)
    config = models.load_config(str(folders / "student"))
    found = hf_adapters.open_folder(str(tmp_path / "adapters"), config)
    jax.tree.map(
        np.testing.assert_array_equal, hf_adapters.load(found, config), result.state.params
    )
    fields = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(folders / "student")


def test_a_run_starts_from_a_folder_of_adapters(straight, folders, tmp_path):
    result, workdir = straight
    export_adapters(str(workdir), str(tmp_path / "adapters"))
    config = with_adapters(folders)
    config.lora.path = str(tmp_path / "adapters")
    weights = load_weights(make_setup(config), student=True)
    jax.tree.map(np.testing.assert_array_equal, weights.student, result.state.params)
    config.lora.alpha = 4.0
    with pytest.raises(ConfigError, match=r"lora.alpha=4.0, but .*--config.lora.alpha='8'"):
        make_setup(config)
    config.lora.alpha, config.lora.targets = 8.0, ("q_proj",)
    with pytest.raises(ConfigError, match=r"--config.lora.targets=.\(\"q_proj\", \"k_proj\""):
        make_setup(config)
    config = with_adapters(folders)
    config.lora.path, config.student.path = str(tmp_path / "adapters"), str(folders / "other")
    shutil.copytree(folders / "student", folders / "other")
    config_of, params = models.load(str(folders / "student"))
    shutil.rmtree(folders / "other")
    models.save(
        str(folders / "other"), config_of, jax.tree.map(lambda w: w * 2, params),
        source=str(folders / "student"),
    )  # fmt: skip
    with pytest.raises(ModelError, match="belong to a base with the hash"):
        load_weights(make_setup(config), student=True)


def same_arrays(one, other) -> bool:
    return all(a is b for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_student_teacher_and_reference_share_one_base(folders):
    config = with_adapters(folders)
    config.teacher.path = "student"
    config.data.teacher_prompt_template = "{problem}\n{solution}"
    config.rollout.max_response_tokens, config.data.bad_rows = 60, "skip"
    setup = make_setup(config)
    weights = load_weights(setup, student=True)
    assert same_arrays(weights.base, weights.teacher)
    assert same_arrays(weights.base, weights.reference)
    config.reference.dtype = "bfloat16"
    weights = load_weights(make_setup(config), student=True)
    assert weights.reference["norm"]["scale"].dtype == jnp.bfloat16
    functions = make_step_functions(setup.spec).beside(weights.base)
    student = functions.compute_weights(weights.student)
    assert student["layers"]["query"]["kernel"] is weights.base["layers"]["query"]["kernel"]


@pytest.mark.slow
def test_a_base_in_bfloat16_trains_float32_adapters(folders, tmp_path):
    config = with_adapters(folders, "opd")
    config.student.dtype, config.steps = "bfloat16", 1
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {np.dtype("float32")}
    assert lines(tmp_path / "run", "metrics.jsonl")[1]["optim/grad_norm"] > 0


@pytest.mark.parametrize("follow", slow("live", "average", "every"))
def test_a_teacher_that_follows_has_the_adapters(folders, tmp_path, follow):
    config = with_adapters(folders, "opd")
    config.teacher.path, config.teacher.follow, config.steps = "student", follow, 2
    if follow == "every":
        config.teacher.every = 1
    config.data.teacher_prompt_template = "{problem}\n{solution}"
    config.rollout.max_response_tokens, config.data.bad_rows = 60, "skip"
    result = train.run(config, str(tmp_path / "run"), command=[])
    if follow != "live":
        assert set(result.state.average) == {"layers"}
    if follow == "every":
        jax.tree.map(np.testing.assert_array_equal, result.state.average, result.state.params)


@pytest.mark.slow
def test_the_first_student_answers_as_its_base_does(folders, tmp_path, straight):
    """Evaluated before training: the answers of a run of all weights and of one of adapters."""
    config = small(folders, "opd")
    config.steps = 1
    train.run(config, str(tmp_path / "run"), command=[])
    one, other = (
        lines(folder / "eval" / "0", "tiny.jsonl") for folder in (tmp_path / "run", straight[1])
    )
    assert [row["answer"] for row in one] == [row["answer"] for row in other]


@pytest.mark.slow
def test_gradient_programs_do_not_hold_the_gradient_of_the_base(folders):
    """The compiled gradient of adapters takes two thirds of the products of the full one, or less."""
    flops = []
    for rank in (0, 1):
        config = small(folders, "opd")
        config.lora.rank = rank
        setup = make_setup(config)
        weights = load_weights(setup, student=False)
        functions = make_step_functions(setup.spec).beside(weights.base)
        program = functions.programs(weights.scorer, None, setup.terms.weights_at(1))
        (widest,) = [p for p in program if p.name.startswith("gradient")][:1]
        flops.append(widest.compile().cost_analysis()["flops"])
    assert flops[1] < flops[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 9}, "lora.rank=9 is more than k_proj has, a matrix of 16 x 8"),
        ({"rank": 0}, "lora.alpha=8.0 has no effect: lora.rank=0"),
        ({"targets": ()}, r"lora.targets=\(\), wanted at least one matrix"),
        ({"targets": ("wq",)}, "lora.targets=.*wanted names among q_proj, k_proj"),
        ({"path": "none"}, "folder of adapters .* does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(folders, changes, message):
    config = with_adapters(folders)
    with config.lora.ignore_type():
        config.lora.update(changes)
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        make_setup(config)
    assert "\n" not in str(caught.value)


def test_jumps_are_refused(folders):
    config = with_adapters(folders)
    config.jump.problems = 4
    with pytest.raises(ConfigError, match=r"jump\.problems=4 with lora\.rank=4, wanted no jumps"):
        make_setup(config)


@pytest.mark.slow
def test_a_run_of_all_weights_has_no_adapters_to_export(folders, tmp_path):
    config = small(folders, "sft")
    config.steps, config.eval.data = 1, ""
    train.run(config, str(tmp_path / "run"), command=[])
    with pytest.raises(ConfigError, match="so there are no adapters"):
        export_adapters(str(tmp_path / "run"), str(tmp_path / "out"))
