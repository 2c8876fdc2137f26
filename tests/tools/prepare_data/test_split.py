"""The split into rows for SFT and for OPD: sizes, shares, independent of the order."""

import numpy as np
import pytest

from opd_jax.tools.prepare_data import config as prepare_config
from opd_jax.tools.prepare_data import run as module
from opd_jax.tools.prepare_data.filters import problem_key
from tests.support.prepared import config, done, read, row, write


def split(count: int, **sizes: object) -> tuple[list[bool], list[bool]]:
    keys = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    section = prepare_config.default().split
    section.update(sizes)
    sft, opd = module._split(keys, section)
    assert not (sft & opd).any()
    return sft, opd


@pytest.mark.parametrize(
    ("sizes", "sft", "opd"),
    [
        ({"sft": 33, "opd": 13}, 33, 13),  # 54 are left over
        ({"sft": 33}, 33, 67),
        ({"opd": 13}, 87, 13),
        ({"sft": 90, "opd": 20}, 90, 10),
        ({"sft": 200, "opd": 20}, 100, 0),
        ({"opd": 200}, 0, 100),
    ],
)
def test_sizes_of_the_split(sizes, sft, opd):
    masks = split(100, **sizes)
    assert (sum(masks[0]), sum(masks[1])) == (sft, opd)


def test_share_of_the_split():
    sft, opd = split(10_000)
    assert np.all(sft != opd)
    assert sum(opd) == pytest.approx(10_000 * 13 / 46, abs=150)  # 3 sigma = 135
    assert sum(split(100, opd_share=0.0)[1]) == 0
    assert sum(split(100, opd_share=1.0)[1]) == 100


@pytest.mark.parametrize("sizes", [{}, {"split__sft": 30, "split__opd": 20}])
def test_the_split_does_not_depend_on_order(tmp_path, sizes):
    rows = [row(f"problem {i}") for i in range(100)]
    members = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        path = write(tmp_path / f"{name}.jsonl", order)
        done(tmp_path / name, config(path, block=7, **sizes))
        members.append({r["problem"] for r in read(tmp_path / name / "opd.jsonl")})
    assert members[0] == members[1]
    done(tmp_path / "c", config(str(tmp_path / "a.jsonl"), seed=1, **sizes))
    assert {r["problem"] for r in read(tmp_path / "c" / "opd.jsonl")} != members[0]


def test_a_shortage_is_noted(tmp_path, train):
    report = done(tmp_path / "out", config(train, split__sft=4, split__opd=13))
    assert (report["sft"], report["opd"]) == (4, 1)
    assert "split.opd=13, but only 1 rows were left" in report["notes"]


def test_keys_see_signs_but_no_white_space():
    assert problem_key("a  b\n") == problem_key("a b")
    assert problem_key("2+3") != problem_key("2-3")
    assert problem_key("a", 0) != problem_key("a", 1) != problem_key("a")
