"""Where the tests find the checkout and the embedded models."""

import pathlib

import opd_jax

PACKAGE = pathlib.Path(opd_jax.__file__).parent
ROOT = PACKAGE.parent
TINY = PACKAGE / "tiny"
STUDENT = TINY / "student"
