"""Adapters on a mesh are those of one device. Needs eight devices: test_mesh.py starts it so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from opd_jax import train
from opd_jax.models import low_rank
from opd_jax.models.low_rank import TARGETS, LowRank
from opd_jax.sharding import mesh
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.training import objective, update
from opd_jax.types import Frozen
from tests.conftest import distance, noisy_params
from tests.models.test_low_rank import noisy_adapters
from tests.sharding import eight_devices
from tests.sharding.eight_devices import CONFIG, EVENTS, TERMS, T, adamw, make
from tests.support.small_run import lines, small, without_times

SPEC = LowRank(4, 8.0, 1.0, tuple(TARGETS))
STUDENT = dataclasses.replace(CONFIG, lora_scale=SPEC.scale)


class Learner(eight_devices.Learner):
    """An update of adapters on a mesh; their base is the reference too."""

    def __init__(self, devices: Mesh):
        shared = {"token_chunk": 7, "remat": "none"}
        events, tx = EVENTS.replace(vocabulary=90), adamw()
        self.devices, self.dtype = devices, jnp.float32
        self.accumulate = update.make_accumulate(
            objective.make_rollout_loss(TERMS, STUDENT, CONFIG, events=events, **shared),
            objective.make_golden_loss(TERMS, STUDENT, events=events, **shared),
            microbatch_tokens=2 * T, dtype=self.dtype, mesh=devices, adapters=True,
        )  # fmt: skip
        self.update = update.make_update(tx, self.accumulate, decay=0.9, mesh=devices)
        masters = noisy_adapters(CONFIG, SPEC)
        if devices is not ONE:
            masters = jax.device_put(masters, devices.masters(masters))
        self.state = devices.init_masters(
            lambda params: update.init_state(params, tx, average=True), masters
        )
        base = noisy_params(CONFIG)
        student, reference = (devices.reshard(base, role) for role in ("student", "reference"))
        self.frozen = Frozen(reference=reference, base=student)


@functools.cache
def learned_alone():
    learner = Learner(ONE)
    gradient = learner.gradient()
    learner.step()
    return gradient, learner.step()


@pytest.mark.parametrize("name", eight_devices.meshes("2x2x2", "2x4x1 sharded"))
def test_updates_of_adapters_are_the_same_on_any_mesh(name):
    (want, wanted), (state, metrics) = learned_alone()
    learner = Learner(devices := make(name))
    got, sums = learner.gradient()
    assert distance(got, want) < 1e-5
    assert distance(sums, wanted) < 1e-5
    learner.step()
    same, others = learner.step()
    assert distance(others, metrics) < 1e-5
    assert distance(same.params, state.params) < 1e-5
    assert distance(same.average, state.average) < 1e-5
    places = jax.tree.leaves(devices.masters(same))
    for leaf, place in zip(jax.tree.leaves(same), places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_new_adapters_are_the_same_on_a_mesh():
    def make_them(shardings):
        init = functools.partial(low_rank.init, config=CONFIG, low_rank=SPEC)
        return jax.jit(init, out_shardings=shardings)(jax.random.key(3))

    like = low_rank.abstract_adapters(CONFIG, SPEC)
    one, eight = make_them(None), make_them(make("8x1x1").masters(like))
    assert distance(one, eight) == 0


@pytest.mark.slow
def test_whole_runs_of_adapters_match_and_go_on_from_each_other(folders, tmp_path, monkeypatch):
    config = small(folders)
    config.lora.rank, config.lora.alpha, config.optim.learning_rate = 4, 8.0, 1e-3
    config.guard.copies = 1
    make_really = mesh.make_mesh
    for steps in (2, 3):  # the third step by the other one
        config.steps = steps
        for name in ("one", "eight"):
            alone = (name == "one") == (steps == 2)
            config.mesh.fsdp = 1 if alone else 4
            for role in mesh.ROLES:
                config.mesh[role] = "replicated" if alone else "sharded"
            made = (lambda _: ONE) if alone else make_really
            monkeypatch.setattr("opd_jax.training.make_setup.make_mesh", made)
            train.run(config, str(tmp_path / name), command=[])
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("one", "eight")]
    assert [row["step"] for row in rows[0]] == [0, 1, 2, 3]
    for one, eight in zip(*rows, strict=True):
        assert one.keys() == eight.keys()
        for key, value in one.items():
            assert eight[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (one["step"], key)
    texts = [lines(tmp_path / name, "rollouts.jsonl") for name in ("one", "eight")]
    for one, eight in zip(*texts, strict=True):
        assert one["response_ids"] == eight["response_ids"]
