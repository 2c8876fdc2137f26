"""Loading onto several devices: the same bits, each shard read alone. In a process of its own."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import sys, tracemalloc
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from opd_jax.models import decoder, hf_load, safetensors_files, save
from tests.conftest import noisy_params, tiny_config

assert jax.device_count() == 4
config = tiny_config(
    num_layers=4, hidden_size=128, intermediate_size=512, vocab_size=4096, tie_embeddings=False,
)
save(sys.argv[1], config, noisy_params(config))
_, whole = hf_load.load(sys.argv[1])
shapes = decoder.abstract_params(config)
line = Mesh(np.array(jax.devices()), ("a",))
square = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
P = PartitionSpec

def along(mesh, axis, names):
    def sharding(leaf):
        spec = [None] * len(leaf.shape)
        spec[axis % len(spec)] = names
        return NamedSharding(mesh, P(*spec))
    return jax.tree.map(sharding, shapes)

def both(leaf):  # two axes of a matrix, as fsdp and tensor parallelism cut it
    if len(leaf.shape) < 2:
        return NamedSharding(square, P())
    return NamedSharding(square, P(*[None] * (len(leaf.shape) - 2), "a", "b"))

cases = {
    "first axis": along(line, 0, "a"), "last axis": along(line, -1, "a"),
    "middle axis": along(line, -2, "a"), "half of the devices": along(square, -1, "b"),
    "both": jax.tree.map(both, shapes), "replicated": along(line, 0, None),
    "one device": jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[3]), shapes),
}
for dtype in (None, jnp.bfloat16):
    want = jax.tree.map(lambda w: w if dtype is None else w.astype(dtype), whole)
    for name, shardings in cases.items():
        safetensors_files.CHUNK = 5000 if name == "both" else 1 << 24
        _, got = hf_load.load(sys.argv[1], dtype, shardings=shardings)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b, s in zip(*map(jax.tree.leaves, (got, want, shardings))):
            assert a.sharding == s and a.dtype == b.dtype, name
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
        print("equal:", name, dtype)

safetensors_files.CHUNK = 1 << 16
decoder.abstract_params = lambda _: shapes
sizes = [leaf.nbytes for leaf in jax.tree.leaves(whole)]
tracemalloc.start()
hf_load.load(sys.argv[1], shardings=cases["last axis"])
peak = tracemalloc.get_traced_memory()[1]
assert peak < sum(sizes) + 0.2 * max(sizes), (peak, sizes)
print("nothing beside the result")
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """What the script says, run on four virtual devices."""
    script = (
        f"import jax\njax.config.update('jax_platforms', 'cpu')\n"
        f"jax.config.update('jax_num_cpu_devices', 4)\n{SCRIPT}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path_factory.mktemp("sharded") / "model")],
        capture_output=True, text=True, timeout=300, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_sharding_gives_the_same_bits(lines):
    assert sum(line.startswith("equal: ") for line in lines) == 14


@pytest.mark.slow
def test_host_memory_is_the_result_and_a_buffer(lines):
    assert lines[-1] == "nothing beside the result"
