"""The public names exist, cost nothing until they are used, and old names say where they have moved."""

import importlib
import subprocess
import sys

import pytest

import opd_jax

pytestmark = pytest.mark.short


def in_new_python(code: str) -> str:
    """What `code` prints in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", opd_jax.PUBLIC)
def test_public_names_exist(name):
    home, _, last = name.rpartition(".")
    module = importlib.import_module(f"opd_jax.{home}")
    names = module.__all__ if last == "*" else [last]
    assert names
    for name in names:
        assert getattr(module, name) is not None


def test_packages_are_attributes():
    code = "import opd_jax; print(callable(opd_jax.models.load), callable(opd_jax.losses.exact_kl))"
    assert in_new_python(code) == "True True"


@pytest.mark.parametrize("module", ["opd_jax", "opd_jax.errors"])
def test_importing_does_not_import_jax(module):
    """The commands set environment variables that jax reads when it starts."""
    assert in_new_python(f"import sys, {module}; print('jax' in sys.modules)") == "False"


def test_a_public_name_that_has_moved_says_where_it_is():
    with pytest.raises(AttributeError, match=r"graded in opd_jax\.grading"):
        opd_jax.eval  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        opd_jax.nothing  # noqa: B018
    assert not hasattr(opd_jax, "eval")
