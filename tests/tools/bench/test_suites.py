"""The suites' own code at toy shapes, with no more packages than a borrowed machine has."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from opd_jax.errors import ConfigError
from opd_jax.tools.bench import correctness, cpu, h200, reference, report, workloads
from opd_jax.tools.bench.run import Options
from tests.support.paths import ROOT

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"grain", "math_verify", "pyarrow", "torch", "jinja2", "tunix", "trl"}:
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Blocked())
from opd_jax.tools.bench import choices, correctness, cpu, h200, report
"""


def test_needs_no_package_beyond_those_of_a_borrowed_machine():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_h200_without_a_gpu_says_so():
    with pytest.raises(ConfigError, match="sees no GPU"):
        h200.run(Options())


def test_reference_agrees_with_the_scorer_in_float32():
    row = correctness.logprobs("float32")[0]
    assert row.error < 1e-3


def test_reference_knows_a_wrong_weight():
    params, row = correctness.weights(), correctness.token_rows()[1]
    before = reference.logprobs(params, correctness.CONFIG, row)
    params["layers"]["value"]["bias"][1, 3] += 1.0
    assert np.abs(reference.logprobs(params, correctness.CONFIG, row) - before).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", [h200.TOY.student, h200.TOY.teacher])
def test_a_counting_model_counts(model):
    subject = workloads.counting_subject(model, "float32")
    prompts, stop = workloads.counting_prompts(model, [1, 5, 8], 4)
    rollout = workloads.decode(subject, prompts, 9, stop_ids=(stop,))
    assert rollout.response_length_B.tolist() == [1, 5, 8]
    assert rollout.response(1) == list(range(stop - 4, stop + 1))


@pytest.mark.short
def test_a_jax_without_target_descriptions_loses_one_row(monkeypatch, tmp_path):
    monkeypatch.delattr("jax._src.lib.xla_client.get_topology_for_devices")
    (row,) = h200._write_target(tmp_path / "target")
    assert row.note.startswith(f"not written: jax {jax.__version__} has no such call")
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_cpu_suite_at_toy_shapes(tmp_path):
    rows = cpu.run(Options(out=tmp_path / "cpu.json", repeats=1, dry=True))
    assert {row.status for row in rows} == {"ok"}, report.table(rows)
    assert report.read(tmp_path / "cpu.json") == rows
    timed = [row for row in rows if not row.name.startswith("ceiling")]
    assert all(row.tokens_per_s and row.fraction and row.peak_gib for row in timed)
    assert all(row.floor_s for row in timed if not row.name.startswith("slots"))


@pytest.mark.long
@pytest.mark.slow
def test_h200_suite_at_toy_shapes(tmp_path):
    rows = h200.run(Options(out=tmp_path / "h200.json", repeats=1, dry=True))
    bad = [row.name for row in rows if row.status != "ok"]
    assert set(bad) <= {"target config"}, report.table(rows)
    assert {"OPD step, extrapolated", "A/B command buffers: WHILE"} <= {row.name for row in rows}
