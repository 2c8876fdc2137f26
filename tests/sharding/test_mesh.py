"""The mesh: what is refused, and the tests that need eight devices, in a process that has them."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.sharding import mesh, partition
from tests.conftest import tiny_config
from tests.support.paths import ROOT

FILES = tuple(
    f"tests/sharding/eight_devices{part}.py"
    for part in ("", "_scores", "_spans", "_runs", "_adapters")
)


def on_eight_devices(*arguments: str, files: tuple[str, ...] = FILES) -> None:
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files, *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_state_on_eight_devices():
    """Its places, its sizes and copies that differ: what compiles next to nothing."""
    on_eight_devices("-k", "divided_among or optax_state or differs_between")


@pytest.mark.slow
def test_on_eight_devices():
    on_eight_devices("-m", "not slow")


@pytest.mark.slow
@pytest.mark.long
def test_on_eight_devices_at_length():
    on_eight_devices("-m", "slow")


@pytest.mark.slow
@pytest.mark.long
def test_all_programs_of_a_mesh_are_compiled_ahead():
    on_eight_devices("-m", "slow or not slow", files=("tests/training/test_precompile.py",))


def section(data: int = -1, fsdp: int = 1, tensor: int = 1) -> ConfigDict:
    asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return ConfigDict(asked | dict.fromkeys(mesh.ROLES, "replicated"))


@pytest.mark.short
@pytest.mark.parametrize(
    ("asked", "devices", "says"),
    [
        (section(data=3), 8, r"needs 3 devices, and this run has 8; set --config.mesh.data=-1, or"),
        (
            section(tensor=6),
            8,
            r"needs a multiple of 6 devices, and this run has 8; .*mesh.tensor=2",
        ),
        (
            section(data=2, fsdp=4),
            4,
            r"mesh.data=2, mesh.fsdp=4, .*needs 8 devices, and this run has 4",
        ),
        (section(fsdp=4), 1, r"this run has 1; .*mesh.fsdp=1 --config.mesh.tensor=1"),
    ],
)
def test_a_mesh_that_is_not_there_is_refused(asked, devices, says):
    with pytest.raises(ConfigError, match=says):
        mesh.make_mesh(asked, jax.devices()[:1] * devices)


@pytest.mark.short
def test_one_device_is_no_mesh():
    assert mesh.make_mesh(section(), jax.devices()[:1]) is mesh.ONE
    assert mesh.make_mesh(section(data=1), jax.devices()[:1]) is mesh.ONE
    tree = {"a": np.arange(2)}
    assert mesh.ONE.rows(tree)["a"].tolist() == [0, 1]
    assert mesh.ONE.reduce(tree) is tree
    assert mesh.ONE.per_replica(len, (mesh.ROWS,), mesh.ROWS) is len


def one_device_with_axes() -> mesh.Mesh:
    types = (AxisType.Auto,) * len(mesh.AXES)
    return mesh.Mesh(jax.make_mesh((1, 1, 1), mesh.AXES, axis_types=types))


@pytest.mark.short
def test_arguments_of_one_kind_have_partitionings_of_their_own():
    """Two trees of other structures and ranks, both WHOLE, beside the one argument of SUMS."""

    def function(matrix, tree, rows, sums):
        return rows * matrix.sum() + tree["bias"].sum(), {"w": sums["w"] + 1.0}

    each = one_device_with_axes().per_replica(
        function, (mesh.WHOLE, mesh.WHOLE, mesh.ROWS, mesh.SUMS), (mesh.ROWS, mesh.SUMS)
    )
    given = (jnp.ones((2, 3)), {"bias": jnp.ones(4)}, jnp.ones((5, 1)), {"w": jnp.zeros((1, 2))})
    rows, sums = jax.jit(each)(*given)
    np.testing.assert_array_equal(rows, np.full((5, 1), 10.0))
    np.testing.assert_array_equal(sums["w"], np.ones((1, 2)))


@pytest.mark.short
@pytest.mark.parametrize(
    ("given", "made"),
    [
        ((mesh.WHOLE, mesh.WHOLE), mesh.WHOLE),
        ((mesh.SUMS, mesh.SUMS), (mesh.SUMS, mesh.SUMS)),
        ((mesh.ROWS, mesh.WHOLE), mesh.SUMS),
    ],
)
def test_a_result_whose_partitioning_is_not_clear_is_refused(given, made):
    """It would get that of whichever argument of its kind came last."""
    each = one_device_with_axes().per_replica(lambda a, b: a, given, made)
    with pytest.raises(AssertionError):
        jax.jit(each)(jnp.ones((1, 2)), {"w": jnp.ones((1, 2, 3))})


def test_heads_that_do_not_divide_are_refused():
    sizes = {"data": 1, "fsdp": 1, "tensor": 4}
    check = partial(partition.check, sizes=sizes, sharded=False)
    check("student", tiny_config(num_heads=4, num_kv_heads=4, intermediate_size=48))
    says = r"mesh.tensor=4 does not divide the student's num_kv_heads=2; set --config.mesh.tensor=2"
    with pytest.raises(ConfigError, match=says):
        check("student", tiny_config(num_kv_heads=2))
    with pytest.raises(ConfigError, match=r"teacher's num_heads=6; set --config.mesh.tensor=2"):
        check("teacher", tiny_config(num_heads=6, num_kv_heads=2))


@pytest.mark.short
def test_slices_and_tensor_do_not_go_together():
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    partition.check("student", tiny_config(), sizes, sharded=False)
    with pytest.raises(
        ConfigError, match=r"mesh.teacher='sharded' does not go together with mesh.tensor=2"
    ):
        partition.check("teacher", tiny_config(), sizes, sharded=True)


@pytest.mark.short
@pytest.mark.parametrize("field", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_that_cannot_be_are_refused(field, value):
    config = configuration.default()
    config.student.path = "x"
    config.mesh[field] = value
    with pytest.raises(ConfigError, match=rf"mesh.{field}={value}, wanted"):
        validate(config)
