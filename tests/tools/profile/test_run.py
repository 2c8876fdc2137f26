"""launch/profile.py on `tiny`: stage times add up to the step, every table has its rows."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.long
@pytest.mark.slow
def test_a_profile_of_tiny_adds_up(tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "profile.py"), f"--workdir={folder}",
         "--config=configs/stable_opd.py", "--hlo"],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "profile" / "summary.json").read_text())
    assert found["steps"] == 2
    assert sum(found["stages_s"].values()) == pytest.approx(found["step_s"], rel=0.1)
    assert {"rollout", "score", "update"} <= found["device_s"].keys()
    assert {"rollout/attend", "score/mlp", "update/token_loss", "update/adamw"} <= found[
        "scopes_s"
    ].keys()
    named = sum(s for scope, s in found["scopes_s"].items() if not scope.endswith("/-"))
    assert named > 0.5 * sum(found["scopes_s"].values())
    assert found["compile_s"]["jit(add_gradient)"] > 0
    assert found["memory_peak_bytes"] > 2**26
    rates = found["ceilings"]
    for stage, work in found["work"].items():
        assert 0 < work["flops"] / found["stages_s"][stage] < 1.5 * rates["flops_per_s"], stage
    assert list((folder / "profile" / "hlo").glob("*after_optimizations.txt"))
    for heading in ("MFU", "device s/step", "count", "compile s", "memory: "):
        assert heading in done.stdout
