"""The best checkpoint: which step is kept, and that it is a workdir of its own."""

import json

import jax
import numpy as np
import pytest

from opd_jax import checkpoint, train
from opd_jax.best import Best
from opd_jax.errors import ConfigError
from opd_jax.export import export
from tests.test_train import folders, small  # noqa: F401 (a fixture)


class Saved:
    """Stands for a checkpoint: notes which steps were written."""

    def __init__(self):
        self.steps = []

    def __call__(self, step):
        return lambda saved: self.steps.append(step)


def offered(folder, values, *, metric="accuracy", more=True):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    saved = Saved()
    for step, value in enumerate(values):
        Best(folder, metric=metric, more=more).offer(step, {metric: value}, saved(step))
    return saved.steps, Best(folder, metric=metric, more=more).record


def test_what_is_kept(tmp_path):
    steps, record = offered(tmp_path / "a", [0.2, 0.5, 0.5, 0.4, float("nan"), 0.6])
    assert steps == [0, 1, 5]  # equal is not better
    assert record == {"step": 5, "metric": "accuracy", "value": 0.6}
    steps, _ = offered(tmp_path / "b", [0.2, 0.5, 0.1], metric="truncation_rate", more=False)
    assert steps == [0, 2]
    assert Best(tmp_path / "b", metric="accuracy", more=True).record is None  # another metric
    with pytest.raises(ConfigError, match=r"eval.best=accuracy, but .* only length_mean"):
        Best(tmp_path / "a", metric="accuracy", more=True).offer(
            9, {"length_mean": 1.0}, Saved()(9)
        )


def test_a_run_keeps_its_best_and_trains_as_without(folders, tmp_path):  # noqa: F811
    config = small(folders)
    config.steps, config.eval.every = 3, 1
    plain = train.run(config, str(tmp_path / "plain"), command=[])
    config.eval.best = "length_mean"  # random weights: no answer is right
    kept = train.run(config, str(tmp_path / "kept"), command=[])
    jax.tree.map(np.testing.assert_array_equal, kept.state, plain.state)
    lengths = {
        step: json.loads((tmp_path / f"kept/eval/{step}/tiny.json").read_text())["length_mean"]
        for step in range(4)
    }
    best = min(lengths, key=lambda step: (lengths[step], step))
    record = json.loads((tmp_path / "kept/best/best.json").read_text())
    assert record == {"step": best, "metric": "length_mean", "value": lengths[best]}
    assert checkpoint.latest_step(tmp_path / "kept" / "best") == best
    assert export(str(tmp_path / "kept" / "best"), str(tmp_path / "model")) == best
