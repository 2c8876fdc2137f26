"""The two lanes of the suite: what every change runs, and what is marked `slow`."""

from typing import Any

import pytest


def slow(*values: Any) -> list:
    """Values of a parametrised test that run in the slow lane only; a tuple stands for one case."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
