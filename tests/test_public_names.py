"""The public names exist, cost nothing until they are used, and old names say where they have moved."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

import opd_jax
from tests.support.paths import PACKAGE

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


@pytest.mark.parametrize("old", sorted(opd_jax.MOVED))
def test_old_names_say_where_they_are(old):
    assert not (PACKAGE / old.replace(".", "/") / "__init__.py").exists()
    assert not (PACKAGE / f"{old.replace('.', '/')}.py").exists()
    with pytest.raises(ImportError, match="has moved: it is opd_jax") as caught:
        importlib.import_module(f"opd_jax.{old}")
    assert "\n" not in str(caught.value)
    new = str(caught.value).partition("it is ")[2]
    places = [word.strip(",") for word in new.split() if word.startswith("opd_jax.")]
    for place in places:
        assert importlib.util.find_spec(place), place


def test_old_names_as_attributes_and_in_from():
    with pytest.raises(AttributeError, match=r"it is opd_jax\.training\.objective now"):
        opd_jax.objectives  # noqa: B018
    with pytest.raises(ImportError, match=r"it is opd_jax\.memory_plan now"):
        exec("from opd_jax import plan")
    with pytest.raises(ImportError, match=r"it is opd_jax\.grading"):
        exec("from opd_jax.eval import grade")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        opd_jax.nothing  # noqa: B018
    assert not hasattr(opd_jax, "eval")
