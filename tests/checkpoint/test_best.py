"""The best checkpoint: which step is kept, and that it is a workdir of its own."""

import json

import jax
import numpy as np
import pytest

from opd_jax import checkpoint, data, train
from opd_jax.checkpoint.best import Best, forget_after
from opd_jax.checkpoint.export import export
from opd_jax.errors import ConfigError
from opd_jax.types import TrainState
from tests.support.small_run import small


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


def test_what_another_protocol_measured_is_replaced(tmp_path):
    """A kept value counts only where it was measured as the new one was."""
    (tmp_path / "config.json").write_text("{}")
    saved, best = Saved(), Best(tmp_path, metric="accuracy", more=True)
    best.offer(1, {"accuracy": 0.9}, saved(1))
    best.offer(2, {"accuracy": 0.4}, saved(2), comparable=lambda step: step != 1)
    best.offer(3, {"accuracy": 0.3}, saved(3), comparable=lambda step: step != 1)
    assert saved.steps == [1, 2]
    assert best.record == {"step": 2, "metric": "accuracy", "value": 0.4}


def test_only_later_steps_are_forgotten(tmp_path):
    forget_after(tmp_path, 0)  # nothing is kept
    offered(tmp_path, [0.2, 0.5])
    forget_after(tmp_path, 1)
    assert Best(tmp_path, metric="accuracy", more=True).record["step"] == 1
    (tmp_path / "best/checkpoints/3").mkdir(parents=True)  # written, and not yet told of
    forget_after(tmp_path, 2)
    assert not (tmp_path / "best").exists()


def test_a_step_that_comes_again_after_a_rollback_is_written_again(tmp_path):
    """A run that went back and came to the step of the best by another way, and does better there."""
    (tmp_path / "config.json").write_text("{}")
    problems = data.open_problems("tiny:train", field="data.train", size=9)
    batches = data.make_batches(problems, batch=2, seed=0, shuffle=True)
    for step, value in ((20, 0.5), (20, 0.6), (10, 0.7)):
        state = TrainState(np.int32(step), {"w": np.full(3, value, np.float32)}, ())
        Best(tmp_path, metric="accuracy", more=True).offer(
            step, {"accuracy": value},
            lambda saved, step=step, state=state: saved.save(step, state, batches, guard=""),
        )  # fmt: skip
        with checkpoint.Checkpoints(tmp_path / "best", keep=1) as saved:
            assert saved.steps == [step]
            got = saved.restore(step, state, batches)
        np.testing.assert_array_equal(got.params["w"], state.params["w"])


@pytest.mark.slow
def test_a_run_keeps_its_best_and_trains_as_without(folders, tmp_path):
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
