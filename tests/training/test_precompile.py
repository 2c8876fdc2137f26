"""Compiling ahead: what is listed is all that a run compiles, whatever the lengths of its rows."""

import logging
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from opd_jax import train
from opd_jax.tools.profile import trace
from opd_jax.training import precompile
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
if jax.device_count() > 1:  # test_mesh.py runs this file on eight
    PROGRAMS |= {"_summed", "_compute"}


def test_every_program_of_a_step_has_a_stage():
    """Also those of several devices, wherever this runs."""
    names = PROGRAMS | {"_summed", "_compute", "_total", "_norm", "_cosine"}
    assert {f"jit_{name}" for name in names} <= trace.PROGRAMS.keys()


@pytest.fixture
def own_cache(tmp_path):
    """A cache of compiled programs for one test alone, which keeps every program."""
    before = {name: jax.config.values[name] for name in (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    )}  # fmt: skip
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
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
        pytest.param({"scoring.compare": "spans", "scoring.span_room": 1.0}, marks=pytest.mark.slow),
    ],
    ids=["stable_opd", "full, slots, two updates", "extrapolation, evidence, copies",
         "support, other prompts", "gate, token weight", "spans of text"],
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
    assert set(compiled) == PROGRAMS
    assert misses(caplog) == []
    jax.clear_caches()  # as in another process, which goes on from the checkpoint
    config.steps = 3
    train.run(config, str(tmp_path / "run"), command=["test"])
    assert len(compiled) == len(set(listed))
    assert misses(caplog) == []


def misses(caplog) -> list[str]:
    """Those of the run's programs that had to be compiled since the log was cleared."""
    told = "\n".join(record.getMessage() for record in caplog.records)
    missed = re.findall(r"CACHE MISS for 'jit_(\w+)'", told)
    return [name for name in missed if name in PROGRAMS]
