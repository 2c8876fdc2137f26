"""Which checkpoints stay."""

import numpy as np
import pytest

from opd_jax import checkpoint, data, train
from opd_jax.checkpoint import manifest
from opd_jax.sharding import multihost
from opd_jax.types import TrainState
from tests.support.small_run import small


def write(folder, steps, *, keep: int) -> list[int]:
    """The steps that are there after these were written, one process each; -5 is an unscheduled 5."""
    problems = data.open_problems("tiny:train", field="data.train", size=9)
    batches = data.make_batches(problems, batch=2, seed=0, shuffle=True)
    for step in steps:
        state = TrainState(np.int32(abs(step)), {"w": np.full(3, step, np.float32)}, ())
        with checkpoint.Checkpoints(folder, keep=keep) as saved:
            saved.save(abs(step), state, batches, guard="", scheduled=step > 0)
    return manifest.steps(folder / "checkpoints")


@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        ([10, 20, 30, 40], 2, [30, 40]),
        # Asked to end three times: the two scheduled ones, and the last.
        ([10, 20, -21, -23, -24], 2, [10, 20, 24]),
        ([10, 20, -24, 30], 2, [20, 30]),
        ([-3, -5], 2, [5]),  # nothing scheduled yet
        ([-3, 10], 1, [10]),
    ],
)
def test_unscheduled_checkpoints_do_not_count(tmp_path, steps, keep, left):
    assert write(tmp_path, steps, keep=keep) == left
    assert all(manifest.damage(tmp_path / "checkpoints" / str(step)) is None for step in left)


def test_the_batch_after_a_resume_is_the_one_that_came_next(tmp_path):
    problems = data.open_problems("tiny:train", field="data.train", size=9)

    def start():
        return data.make_batches(problems, batch=2, seed=0, shuffle=True)

    batches, state = start(), TrainState(np.int32(3), {"w": np.ones(3, np.float32)}, ())
    for _ in range(3):
        next(batches)
    with checkpoint.Checkpoints(tmp_path, keep=1) as saved:
        saved.save(3, state, batches, guard="")
        saved.wait()
        next(batches)  # taken by a step that was not saved
        resumed = start()
        restored = saved.restore(3, state, resumed)
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])
    straight = start()
    wanted = [next(straight) for _ in range(4)][-1]
    assert [p.id for p in next(resumed)] == [p.id for p in wanted]


@pytest.mark.slow
def test_the_checkpoint_of_the_end_pushes_no_other_out(folders, tmp_path):
    config = small(folders)
    config.eval.data, config.checkpoint.every, config.checkpoint.keep = "", 2, 1
    for steps, left in ((3, [2, 3]), (4, [4])):
        config.steps = steps
        train.run(config, str(tmp_path / "run"), command=[])
        assert manifest.steps(tmp_path / "run" / "checkpoints") == left


def test_process_0_decides_which_checkpoints_are_removed(tmp_path, monkeypatch):
    """Process 1 of two: its listing of a network disk is older, and it takes part all the same."""
    barriers = []
    with checkpoint.Checkpoints(tmp_path, keep=1) as saved:
        monkeypatch.setattr(multihost, "from_first", lambda make: [7])  # make() has none to remove
        monkeypatch.setattr(multihost, "first", lambda: False)
        monkeypatch.setattr(multihost, "agree", barriers.append)
        saved._unscheduled = {7, 8}
        saved._remove([])
        assert saved._unscheduled == {8}
        assert barriers == [{}]
        monkeypatch.setattr(multihost, "from_first", lambda make: [])
        saved._remove([7])
        assert barriers == [{}]
