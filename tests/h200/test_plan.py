"""The memory plan of a 1.5B model against programs compiled for an H200: within 5 and 20 %."""

import pathlib

import pytest

from configs import stable_opd
from opd_jax import hardware
from opd_jax.memory_plan import verify
from opd_jax.memory_plan.workload import of_config

TARGET = pathlib.Path(__file__).parent / "target_config.txtpb"


def test_planned_bytes_are_those_of_the_compiled_programs():
    config = stable_opd.get_config("qwen2.5-math-1.5b,data=problems.jsonl")
    device = hardware.find("h200")
    for row in verify.compare(config, of_config(config, device, 1), device, TARGET):
        print(row)
        assert row.planned_arguments == pytest.approx(row.arguments, rel=0.05), row.program
        if row.temporaries > 2**20:  # the optimizer has none
            assert row.planned_temporaries == pytest.approx(row.temporaries, rel=0.2), row.program
