"""On a mesh nothing changes but where things are computed. Needs eight devices: test_mesh.py starts it so."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from opd_jax import checkpoint, data, losses
from opd_jax.config.fields import default
from opd_jax.data import microbatches
from opd_jax.errors import CopiesError
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.sharding import mesh, replica_check
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.sharding.partition import Slice
from opd_jax.training import objective, optimizer, update
from opd_jax.training.terms import ON_ROLLOUTS, default_terms
from opd_jax.types import Ends, Frozen, GoldenRows, RolloutRows, Support
from tests.conftest import distance, noisy_params, random_rows, tiny_config

# Neither 5 rows nor 11 prompts divide among 8; nothing of the model is divided by more than 4.
CONFIG = tiny_config(num_layers=2, num_kv_heads=4)
TEACHER = tiny_config(num_layers=1, num_kv_heads=4, hidden_size=16)
B, T = 5, 12
SCORED = np.ones(90, bool)
SCORED[[5, 4, 60, 11]] = False
# End tokens of each model's own, one of them beyond the ids that are shared.
EVENTS = Events(
    scored_V=SCORED, ends=Ends(id=3, student=(3, 5), teacher=(4, 92), reference=(5, 60))
)
MESHES = ["8x1x1", "1x8x1", "2x2x2", "1x1x4", "1x8x1 sharded", "2x4x1 sharded"]
SHORT = ("2x2x2", "2x4x1 sharded")


def make(name: str) -> Mesh:
    """The mesh of that name; 1x1x4 leaves four of the devices alone."""
    shape = [int(size) for size in name.split()[0].split("x")]
    how = "sharded" if "sharded" in name else "replicated"
    section = dict(zip(mesh.AXES, shape, strict=True)) | dict.fromkeys(mesh.ROLES, how)
    return mesh.make_mesh(ConfigDict(section), jax.devices()[: int(np.prod(shape))])


def meshes(*short: str) -> list:
    """All of them for a test that is slow but on these."""
    return [
        name if name in short else pytest.param(name, marks=pytest.mark.slow) for name in MESHES
    ]


@pytest.fixture(params=meshes(*SHORT))
def devices(request) -> Mesh:
    return make(request.param)


@pytest.fixture(scope="module")
def params() -> decoder.Params:
    return noisy_params(CONFIG)


def on(devices: Mesh, params: decoder.Params) -> decoder.Params:
    """Compute weights."""
    return devices.reshard(params, "teacher")


# The update.


def make_rows(seed: int) -> RolloutRows:
    tokens_BT, length_B = map(np.asarray, random_rows(CONFIG, B, T, seed))
    position_T = np.arange(T)[None]
    mask_BT = (position_T >= 2) & (position_T < length_B[:, None])
    noise = np.random.default_rng(seed).normal(size=(2, B, T)).astype(np.float32)
    return RolloutRows(
        tokens_BT=tokens_BT, length_B=length_B,
        weight_BT=losses.token_weights(mask_BT, "token"),
        advantage_BT=noise[0], sampler_logprob_BT=-3.0 + 0.1 * noise[1],
    )  # fmt: skip


ROWS = make_rows(0)
PART = microbatches.MicroBatch(np.arange(B), 8, T)
GOLDEN = GoldenRows(ROWS.tokens_BT, ROWS.length_B, ROWS.weight_BT)
TERMS = default_terms(pg_weight=1.0, lambda_gold=0.3, beta_kl=0.2)


class Learner:
    """An update on a mesh, from the same weights; 2 rows of a replica at a time."""

    def __init__(self, devices: Mesh, params: decoder.Params, tx, dtype=jnp.float32):
        shared = {"token_chunk": 7, "remat": "none"}
        events = EVENTS.replace(vocabulary=90)
        self.devices, self.dtype = devices, dtype
        self.accumulate = update.make_accumulate(
            objective.make_rollout_loss(TERMS, CONFIG, CONFIG, events=events, **shared),
            objective.make_golden_loss(TERMS, CONFIG, events=events, **shared),
            microbatch_tokens=2 * T,
            dtype=dtype,
            mesh=devices,
        )
        self.update = update.make_update(tx, self.accumulate, decay=0.9, mesh=devices)
        masters = jax.tree.map(jnp.copy, params)
        if devices is not ONE:
            masters = jax.device_put(masters, devices.masters(masters))
        self.state = devices.init_masters(
            lambda params: update.init_state(params, tx, average=True), masters
        )
        self.frozen = Frozen(reference=on(devices, noisy_params(CONFIG, seed=2)))

    @property
    def own(self) -> decoder.Params:
        if self.devices is ONE:
            return self.state.params
        return self.devices.compute_weights(self.state.params, self.dtype)

    def gradient(self):
        return self.accumulate(self.own, self.frozen, ROWS, GOLDEN, TERMS.weights)

    def step(self):
        student = None if self.devices is ONE else self.own
        self.state, metrics = self.update(
            self.state, self.frozen, ROWS, GOLDEN, TERMS.weights, student=student
        )
        return self.state, metrics


def adamw():
    section = default().optim
    section.update({"learning_rate": 1e-3, "weight_decay": 0.1})
    return optimizer.make_optimizer(section, 10)


@functools.cache
def learned_alone():
    """The gradient and its sums, the state after two steps and the metrics of the second."""
    learner = Learner(ONE, noisy_params(CONFIG), adamw())
    gradient = learner.gradient()
    learner.step()
    return gradient, learner.step()


def test_a_gated_divergence_is_the_same_on_a_mesh(params):
    """Over a support: the gate is one more array of the rows, the support a tree of them."""
    generator = np.random.default_rng(5)
    ids_BTX = np.tile(np.arange(4, dtype=np.int32) * 7, (B, T, 1))
    logprob_BTX = -generator.uniform(2, 5, (B, T, 4)).astype(np.float32)
    support = Support(ids_BTX, logprob_BTX, logprob_BTX, logprob_BTX[..., 0])
    gate_BT = (generator.uniform(size=(B, T)) < 0.5).astype(np.float32)
    given = ROWS.replace(support=support, divergence_gate_BT=gate_BT)
    terms = default_terms(
        pg_weight=1.0, divergence_weight=1.0, direction="forward", support="teacher", top_k=4,
        form="teacher_renormalised", gate="acceptance",
    )  # fmt: skip
    loss = objective.make_rollout_loss(
        terms, CONFIG, token_chunk=7, remat="none", events=EVENTS.replace(vocabulary=90)
    )
    results = []
    for devices in (ONE, make("2x2x2")):
        accumulate = update.make_accumulate(
            loss, None, microbatch_tokens=2 * T, dtype=jnp.float32, mesh=devices
        )
        own = params if devices is ONE else on(devices, params)
        results.append(accumulate(own, Frozen(), given, None, terms.weights))
    (want, wanted), (got, sums) = results
    assert distance(got, want) < 1e-5
    assert distance(sums, wanted) < 1e-5
    assert abs(float(wanted["divergence"])) > 1e-3


def test_soft_labels_on_golden_solutions_are_the_same_on_a_mesh(params):
    """Beside the supervised term; hidden states are rows as well, the teacher's head is sharded."""
    scored_BT = np.array(GOLDEN.weight_BT > 0)
    scored_BT[0] = False
    noise = np.random.default_rng(6).normal(size=(B, T, CONFIG.hidden_size)).astype(np.float32)
    given = GOLDEN.replace(
        divergence_weight_BT=np.asarray(losses.token_weights(scored_BT, "token")),
        teacher_hidden_BTD=noise,
    )
    terms = default_terms(pg_weight=0.0, lambda_gold=0.3, golden_divergence=1.0)
    loss = objective.make_golden_loss(
        terms, CONFIG, token_chunk=7, remat="none", events=EVENTS.replace(vocabulary=90)
    )
    results = []
    for devices in (ONE, make("2x2x2")):
        accumulate = update.make_accumulate(
            None, loss, microbatch_tokens=2 * T, dtype=jnp.float32, mesh=devices
        )
        own, teacher = params, noisy_params(CONFIG, seed=2)
        if devices is not ONE:
            own, teacher = on(devices, own), on(devices, teacher)
        frozen = Frozen(teacher=decoder.head_alone(teacher))
        results.append(accumulate(own, frozen, None, given, terms.weights))
    (want, wanted), (got, sums) = results
    assert distance(got, want) < 1e-5
    assert distance(sums, wanted) < 1e-5
    assert float(wanted["golden_divergence"]) > 1e-3


def test_updates_are_the_same_on_any_mesh(devices, params):
    (want, wanted), (state, metrics) = learned_alone()
    learner = Learner(devices, params, adamw())
    got, sums = learner.gradient()
    assert distance(got, want) < 1e-5
    assert distance(sums, wanted) < 1e-5
    learner.step()
    same, others = learner.step()
    assert distance(others, metrics) < 1e-5
    assert distance(same.params, state.params) < 1e-5
    assert distance(same.average, state.average) < 1e-5
    moved = [jax.tree.map(lambda a, b: a - b, x.params, params) for x in (same, state)]
    assert distance(*moved) < 1e-4  # Adam divides rounding by rounding where the gradient is 0
    assert same.step == 2
    for leaf, place in zip(
        jax.tree.leaves(same), jax.tree.leaves(devices.masters(same)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_masters_and_optimiser_are_divided_among_the_replicas(params):
    devices = make("8x1x1")
    state = Learner(devices, params, adamw()).state
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert here < total / 8 * 1.05
    kernel = state.params["layers"]["query"]["kernel"]  # [2 layers, 32, 32]: 2 do not divide by 8
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 32)
    assert state.opt_state[1][0].mu["norm"]["scale"].sharding.shard_shape((32,)) == (4,)


def test_slices_are_gathered_a_layer_at_a_time(params):
    devices = make("1x8x1 sharded")
    learner = Learner(devices, params, adamw())
    own = learner.own
    matrices = [leaf for leaf in jax.tree.leaves(own) if leaf.ndim > 2 or leaf.shape[0] > 90]
    for leaf in matrices:
        assert leaf.addressable_shards[0].data.nbytes * 8 == leaf.nbytes
    rows = devices.rows(jax.tree.map(np.zeros_like, microbatches.gather(ROWS, PART)))
    weights = {term: 1.0 for term in ON_ROLLOUTS}
    add = learner.accumulate.on_rollouts.lower(
        own, learner.frozen, rows, weights, devices.zeros(own)
    ).compile()
    moved = collectives(add.as_text())
    # The embedding, which is the head as well, is the largest; no kernel of both layers at once.
    whole = {int(np.prod(leaf.shape)) for leaf in matrices if leaf.ndim > 2}
    assert not whole & {size for kind, size in moved if kind == "all-gather"}
    assert {kind for kind, _ in moved} == {"all-gather", "reduce-scatter"}


def test_a_layer_gathers_its_slices_again_in_the_backward_pass():
    """Saved, the gathered weights of all layers would be on every device at once."""
    config = tiny_config(num_layers=6)  # more than decoder.SHALLOW
    params = noisy_params(config)
    tokens, length = random_rows(config, 2, 16)
    layers = {
        name: {
            key: Slice(leaf, -2) if leaf.ndim == 3 else leaf  # [layers, in, out], divided by inputs
            for key, leaf in arrays.items()
        }
        for name, arrays in params["layers"].items()
    }
    own = params | {"layers": layers}
    spec = jax.tree.map(
        lambda leaf: leaf.replace(value=P(None, "fsdp")) if isinstance(leaf, Slice) else P(),
        own, is_leaf=lambda leaf: isinstance(leaf, Slice),
    )  # fmt: skip

    def loss(params, sums):
        return jnp.sum(decoder.hidden_states(params, config, tokens, length, sums=sums))

    specs = (spec, spec["layers"])
    auto = (jax.sharding.AxisType.Auto,)
    gradient = jax.shard_map(
        jax.grad(loss, (0, 1)),
        mesh=jax.make_mesh((2,), ("fsdp",), axis_types=auto, devices=jax.devices()[:2]),
        in_specs=specs, out_specs=specs, check_vma=False,
    )  # fmt: skip
    sums = jax.tree.map(jnp.zeros_like, own["layers"])
    text = jax.jit(gradient).lower(own, sums).compile().as_text()
    matrices = sum(
        isinstance(leaf, Slice) for arrays in layers.values() for leaf in arrays.values()
    )
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 2 * matrices == 14


@pytest.mark.parametrize("name", ["8x1x1", pytest.param("2x2x2", marks=pytest.mark.slow)])
def test_programs_of_the_update_gather_no_masters(params, name):
    devices = make(name)
    learner = Learner(devices, params, adamw(), jnp.bfloat16)
    state, own = learner.state, learner.own
    (part,) = microbatches.shapes(B, width=T, tokens=99, replicas=devices.replicas)[:1]
    rows = jax.tree.map(np.zeros_like, microbatches.gather(ROWS, part))
    weights = {term: 1.0 for term in ON_ROLLOUTS}
    grads = devices.zeros(own)
    add = learner.accumulate.on_rollouts.lower(
        own, learner.frozen, devices.rows(rows), weights, grads
    ).compile()
    reduce = mesh._summed.lower(grads, mesh=devices).compile()
    total = jnp.zeros(())
    apply = learner.update.apply.lower(state, state.params, total).compile()
    compute = mesh._compute.lower(
        state.params, dtype=jnp.bfloat16, role="student", mesh=devices
    ).compile()
    kinds = {k: {kind for kind, _ in collectives(c.as_text())} for k, c in
             {"add": add, "reduce": reduce, "apply": apply, "compute": compute}.items()}  # fmt: skip
    if name == "8x1x1":
        assert kinds["add"] == set()  # replicas are silent until all micro-batches are through
    assert "all-gather" not in kinds["reduce"] | kinds["apply"], kinds
    assert "reduce-scatter" in kinds["reduce"]
    assert kinds["apply"] <= {"all-reduce"}  # of the norm
    assert all(size <= 64 for _, size in collectives(apply.as_text()))
    assert "all-gather" in kinds["compute"]
    masters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    state_bytes = apply.memory_analysis().argument_size_in_bytes
    assert state_bytes < 5 * masters / devices.replicas * 1.1


@pytest.mark.parametrize("source", [*meshes("2x4x1 sharded"), "1x1x1"])
def test_a_checkpoint_of_one_mesh_restores_on_all_others(params, tmp_path, source):
    every = {name: make(name) for name in MESHES} | {"1x1x1": ONE}
    begin = functools.partial(update.init_state, tx=adamw(), average=True)
    noise = np.random.default_rng(0)
    want = jax.tree.map(
        lambda x: noise.normal(size=x.shape).astype(x.dtype), jax.eval_shape(begin, params)
    )
    batches = data.make_batches(list(range(9)), batch=2, seed=0, shuffle=True)
    with checkpoint.Checkpoints(tmp_path, keep=1) as saved:
        places = every[source].masters(want)
        state = jax.tree.map(jnp.asarray, want)
        saved.save(1, state if source == "1x1x1" else jax.device_put(want, places), batches, "{}")
        for devices in every.values():
            places = devices.masters(want)
            got = saved.restore(1, devices.structs(want, places), batches)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)
            if devices is not ONE:
                assert jax.tree.map(lambda leaf: leaf.sharding, got) == places


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and elements of every collective operation of a compiled program."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
            for dims in re.findall(r"\w+\[([\d,]*)\]", result)
        ]
        found.append((kind, max(sizes)))
    return found


def test_optax_state_is_all_that_a_mesh_does_not_know(params):
    """Counts and the like lie whole on every device."""
    devices = make("2x2x2")
    state = update.init_state(params, optax.adam(1e-3))
    places = devices.masters(state)
    assert places.step.is_fully_replicated
    assert places.opt_state[0].count.is_fully_replicated
    assert not places.opt_state[0].mu["embed"]["embedding"].is_fully_replicated


def test_a_bit_that_differs_between_copies_is_found(params):
    """One of device 5's copies is changed: its array, its part and the device are named."""
    devices = make("2x2x2")
    state = devices.reshard(params, "student")
    replica_check.require_equal({"state": state}, when="now")
    weight = state["layers"]["query"]["kernel"]
    shards = [shard.data for shard in weight.addressable_shards]
    (bad,) = (i for i, shard in enumerate(weight.addressable_shards) if shard.device.id == 5)
    bits = np.array(shards[bad]).view(np.uint32)
    bits.flat[0] ^= 1
    shards[bad] = jax.device_put(bits.view(np.float32), jax.devices()[5])
    wrong = jax.make_array_from_single_device_arrays(weight.shape, weight.sharding, shards)
    state["layers"]["query"]["kernel"] = wrong
    named = r"1 part .*\['query'\]\['kernel'\]\[0:2, 0:32, 16:32\]: 1, 3, 7 against 5;"
    with pytest.raises(CopiesError, match=named):
        replica_check.require_equal({"state": state}, when="after step 3")
