"""A short lane of mutated inputs for every reader; `python -m tests.support.fuzz 10000` is the long one."""

import os

import pytest

from opd_jax import workdir
from tests.support import fuzz
from tests.support.fuzz_readers import READERS
from tests.support.lanes import slow

COUNT = int(os.environ.get("OPD_JAX_FUZZ", "100"))
# A process, or files that are synced; and configs, of which few are accepted and each takes milliseconds.
OWN = {"grades": 20, "workdir": 30, "config": 500}


@pytest.mark.parametrize("part", [0.4, *slow(1.0)])
@pytest.mark.parametrize("name", list(READERS))
def test_mutated_input_is_accepted_or_refused(name, part, tmp_path):
    count = int(part * (COUNT if COUNT != 100 else OWN.get(name, COUNT)))
    accepted, slowest, grown = fuzz.lane(name, count, tmp_path)
    assert accepted > 0
    assert accepted < count or name in ("answers", "grades")  # of which nothing is ever refused
    assert slowest < fuzz.LIMIT_S
    assert grown < fuzz.GROWTH_MIB
    assert not os.path.exists("/tmp/pwned")


@pytest.mark.short
@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("--config.steps=10", "--config.steps=10"),
        ("--api_key=abc", "--api_key=***"),
        ("HF_TOKEN=hf_abcdefghijklmnopqrst", "HF_TOKEN=***"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("--data=https://me:secret@host/rows.jsonl", "--data=https://me:***@host/rows.jsonl"),
        ("0123456789abcdef0123456789abcdef01234567", "***"),  # W&B's
        ("--config.optim.token_chunk=256", "--config.optim.token_chunk=256"),
    ],
)
def test_secrets_do_not_reach_run_json(word, kept):
    assert workdir.without_secrets(word) == kept
    assert workdir.provenance([word])["command"] == [kept]
