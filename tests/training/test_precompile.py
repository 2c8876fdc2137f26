"""Compiling ahead: what is listed is all that a run compiles, whatever the lengths of its rows."""

import contextlib
import importlib
import logging
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from opd_jax import train, train_loop
from opd_jax.tools.profile import trace
from opd_jax.training import precompile
from tests.support.paths import ROOT
from tests.support.small_run import small

PROGRAMS = {
    "decode_chunk",
    "prefill",
    "unstack",
    "empty",
    "score_part",
    "add_gradient",
    "apply",
    "_zeros_like",
}
DECODING = {"decode_chunk", "prefill", "unstack", "empty"}
if jax.device_count() > 1:  # test_mesh.py runs this file on eight
    PROGRAMS |= {"_summed", "_compute"}


def test_every_program_of_a_step_has_a_stage():
    """Also those of several devices, wherever this runs."""
    names = PROGRAMS | {"_summed", "_compute", "_total", "_norm", "_cosine"}
    assert {f"jit_{name}" for name in names} <= trace.PROGRAMS.keys()


@pytest.mark.short
def test_a_gpu_compiles_one_program_at_a_time():
    assert precompile.threads("gpu") == 1
    assert precompile.threads("cpu") >= 1


@pytest.fixture
def own_cache(tmp_path):
    """A cache of compiled programs for one test alone, which keeps every program."""
    with settings(
        jax_compilation_cache_dir=str(tmp_path / "programs"),
        jax_persistent_cache_min_compile_time_secs=0.0,
    ):
        yield


@contextlib.contextmanager
def settings(**values):
    """JAX with these settings and without the programs that it has in memory."""
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"loss.divergence_weight": 1.0, "rollout.slots": 3, "optim.updates_per_rollout": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.extrapolation": 1.25, "loss.beta_kl": 0.0, "teacher.path": "student",
             "teacher.follow": "every", "teacher.every": 2, "loss.group_coef": 1.0,
             "loss.evidence_share": 0.5, "loss.evidence_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.support": "student", "loss.advantage": "support",
             "rollout.stop_on_repetition": 20, "data.teacher_prompt_template": "{problem}?",
             "data.bad_rows": "skip"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.divergence_weight": 1.0, "loss.direction": "forward", "loss.support": "teacher",
             "loss.gate": "acceptance", "loss.token_weight": "ta", "optim.updates_per_rollout": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"rollout.horizon": (12, 60), "rollout.horizon_steps": 1, "jump.problems": 11,
             "jump.candidates": 1, "loss.low_kl_window": 3, "loss.low_kl_rollouts": 1,
             "loss.low_kl_steps": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.golden_divergence": 1.0, "loss.golden_support": "teacher",
             "loss.golden_steps": 1, "optim.updates_per_rollout": 2,
             "data.teacher_prompt_template": "{problem}?", "data.bad_rows": "skip"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.golden_divergence": 1.0, "loss.pg_weight": 0.0, "loss.beta_kl": 0.0},
            marks=pytest.mark.slow,
        ),
        pytest.param({"scoring.compare": "spans", "scoring.span_room": 1.0}, marks=pytest.mark.slow),
        pytest.param(
            {"scoring.compare": "spans", "scoring.span_room": 1.0, "loss.divergence_weight": 1.0,
             "loss.span_events": "matched", "optim.updates_per_rollout": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"teachers.others": "itself=student", "teachers.weights": (3.0, 1.0),
             "teachers.wait": "host"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"harness.prompt": "Plan: {problem}", "harness.max_tokens": 12,
             "harness.max_prompt_tokens": 60, "data.teacher_prompt_template": "{problem} {plan}",
             "rollout.max_response_tokens": 60, "rollout.max_prompt_tokens": 48,
             "data.bad_rows": "skip"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["stable_opd", "full, slots, two updates", "extrapolation, evidence, copies",
         "support, other prompts", "gate, token weight", "horizon, jumps, cut",
         "soft labels that fall to 0", "soft labels alone", "spans of text", "divergence by spans",
         "two teachers", "harness"],
)  # fmt: skip
def test_a_run_meets_no_program_that_was_not_compiled_ahead(
    folders, tmp_path, own_cache, changes, monkeypatch, caplog
):  # fmt: skip
    config = small(folders)
    config.eval.data = ""
    config.steps, config.log.gradients = 2, 1
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    caplog.set_level(logging.DEBUG, logger="jax._src.compiler")
    listed, compiled = [], []

    def compile_all(programs):
        listed.extend(program.name for program in programs)
        seconds = compile_all_really(programs)
        compiled.extend(misses(caplog))
        caplog.clear()
        return seconds

    compile_all_really = precompile.compile_all
    monkeypatch.setattr(precompile, "worthwhile", lambda: True)
    monkeypatch.setattr(precompile, "compile_all", compile_all)
    train.run(config, str(tmp_path / "run"), command=["test"])
    assert len(listed) == len(set(listed)) == len(compiled)
    assert set(compiled) == PROGRAMS - (set() if config.loss.pg_weight else DECODING)
    assert misses(caplog) == []
    jax.clear_caches()  # as in another process, which goes on from the checkpoint
    config.steps = 3
    train.run(config, str(tmp_path / "run"), command=["test"])
    assert len(compiled) == len(set(listed))
    assert misses(caplog) == []


RECIPES = ("opd", "stable_opd", "topk_opd", "grpo", "opsd", "sft")  # files of configs/ that train


def test_every_file_of_configs_that_trains_is_a_recipe_here():
    others = {"__init__", "recipes", "methods", "evaluate", "prepare_data"}
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {*RECIPES, *others}


def toy(recipe: str, folders):
    """The recipe with the models of `small`, and of about its size."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    sizes = small(folders)
    config.student.path = sizes.student.path
    if config.teacher.path not in ("", "student"):
        config.teacher.path = sizes.teacher.path
    config.rollout.update(
        prompts_per_step=4, samples_per_prompt=2, max_prompt_tokens=36, max_response_tokens=64
    )
    config.data.size, config.data.bad_rows = sizes.data.size, "skip"
    config.optim.microbatch_tokens = sizes.optim.microbatch_tokens
    config.optim.token_chunk = config.scoring.token_chunk = sizes.optim.token_chunk
    config.metrics, config.eval.data, config.steps = sizes.metrics, "", 3
    return config


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A cache that the recipes share: a program that another one has listed is not compiled again."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_compiles_anything_after_its_first_step(
    folders, tmp_path, programs, recipe, monkeypatch, caplog
):  # fmt: skip
    """The programs of a step are all listed; the small ones of the host are met in the first step.

    They are compiled without XLA's optimisations: which ones there are is the same.
    """
    caplog.set_level(logging.DEBUG, logger="jax._src.compiler")
    steps, missed = [], []

    def compile_all(programs):
        seconds = compile_all_really(programs)
        caplog.clear()
        return seconds

    def step(self, number, *args, **kwargs):
        steps.append(number)
        if number == 2:
            missed.extend(misses(caplog))  # programs of the first step, which were listed
            caplog.clear()
        return step_really(self, number, *args, **kwargs)

    compile_all_really, step_really = precompile.compile_all, train_loop.Step.__call__
    monkeypatch.setattr(precompile, "worthwhile", lambda: True)
    monkeypatch.setattr(precompile, "compile_all", compile_all)
    monkeypatch.setattr(train_loop.Step, "__call__", step)
    with settings(
        jax_compilation_cache_dir=programs,
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_disable_most_optimizations=True,
    ):
        train.run(toy(recipe, folders), str(tmp_path / "run"), command=["test"])
    assert steps == [1, 2, 3]
    assert missed == []
    assert all_misses(caplog) == []


def misses(caplog) -> list[str]:
    """Those of the run's programs that had to be compiled since the log was cleared."""
    return [name for name in all_misses(caplog) if name in PROGRAMS]


def all_misses(caplog) -> list[str]:
    """Names of all programs that had to be compiled since the log was cleared."""
    told = "\n".join(record.getMessage() for record in caplog.records)
    return re.findall(r"CACHE MISS for 'jit_(\w+)'", told)
