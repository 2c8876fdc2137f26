"""The plan of several devices: eight of a CPU's, in a process of their own."""

import pytest

from tests.sharding.test_mesh import on_eight_devices


@pytest.mark.slow
def test_plans_on_eight_devices():
    on_eight_devices(files=("tests/memory_plan/eight_devices.py",))
