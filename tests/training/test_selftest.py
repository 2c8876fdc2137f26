"""The self-test at a start: nothing to report on sound programs, and faults that it must find.

`python -m tests.support.selftest_faults MODEL DTYPE` prints the differences of a real model.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest

from launch.make_tiny import make_tokenizer
from opd_jax import models, scoring, train
from opd_jax.errors import SelfTestError
from opd_jax.rollout import decode_state
from opd_jax.training import selftest
from opd_jax.training.selftest import Found, Gap
from tests.conftest import random_params, tiny_config
from tests.support.selftest_faults import FAULTS, flip_a_weight, measure, prepared
from tests.support.small_run import small


@pytest.mark.short
def test_the_gap_by_hand():
    a, b = np.array([[0.0, -1.0, -2.0]], np.float32), np.array([[9.0, -1.5, -2.25]], np.float32)
    assert selftest.gap(a, b, np.array([[False, True, True]])) == Gap(0.375, 0.5)
    assert selftest.gap(a, b, np.zeros((1, 3), bool)) == Gap(0.0, 0.0)


def found(**changes) -> Found:
    nothing = Gap(0.0, 0.0)
    return dataclasses.replace(
        Found(nothing, nothing, nothing, tokens=10, dtype="float32", seconds=1.5), **changes
    )


@pytest.mark.short
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"repeated": Gap(2e-4, 2e-4)}, "two passes of the scorer over the same rows differ by 2.0e-04"),
        ({"resplit": Gap(1e-5, 0.02)}, "micro-batches of different shapes differ by 1.0e-05 and 2.0e-02"),
        ({"sampled": Gap(float("nan"), float("nan"))}, "sampler and scorer differ by nan"),
        ({"sampled": Gap(0.04, 0.1), "dtype": "bfloat16"}, "wanted at most 3.0e-02 and 1.0e+00 in bfl"),
    ],
)  # fmt: skip
def test_a_difference_above_the_bound_is_one_line(changes, what):
    with pytest.raises(SelfTestError) as error:
        selftest.require(found(**changes))
    assert what in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.short
def test_differences_within_the_bound_are_a_line_of_the_start():
    selftest.require(found(sampled=Gap(1e-4, 1e-2)))
    selftest.require(found(sampled=Gap(2e-2, 0.9), dtype="bfloat16"))
    assert selftest.line(found(sampled=Gap(1e-6, 2e-6))) == (
        "self-test: over 10 tokens the scorer repeats bit for bit, and differs by 0.0e+00 and 0.0e+00 in "
        "another micro-batch and by 1.0e-06 and 2.0e-06 from the sampler (mean and largest, in nats; bound "
        "1.0e-04 and 1.0e-02); 1.5 s"
    )
    assert "differs by 1.0e-06 and 1.0e-06 when it is repeated" in selftest.line(
        found(repeated=Gap(1e-6, 1e-6))
    )


@pytest.mark.short
@pytest.mark.parametrize(
    ("field", "platform", "is_wanted"),
    [("off", "gpu", False), ("gpu", "gpu", True), ("gpu", "cpu", False), ("always", "cpu", True)],
)
def test_where_it_runs(field, platform, is_wanted):
    assert selftest.wanted(field, platform) is is_wanted


@pytest.fixture(scope="module")
def peaked(tmp_path_factory):
    """A folder with random weights whose distributions are far from uniform."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "peaked", make_tokenizer()
    model = tiny_config(
        vocab_size=len(tokenizer), num_layers=2, max_position=256,
        eos_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    models.save(str(folder), model, random_params(model, scale=8.0), tokenizer)
    return functools.cache(functools.partial(prepared, str(folder), str(folder), budget=48))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_programs_pass(peaked, dtype):
    setup, functions, *weights = peaked(dtype)
    result, text = measure((setup, functions, *weights), None)
    print(dtype, "sound", text)
    selftest.require(result)
    assert result.tokens > 200
    assert result.dtype == dtype
    assert result.repeated == Gap(0.0, 0.0)
    assert 0 < result.sampled.mean <= selftest.BOUNDS[dtype].mean / 2
    rollout = selftest.sample(functions, weights[0], [[3, 4, 5]] * functions.spec.rollouts)
    narrow, wide = selftest.shapes(functions, rollout, None)
    assert narrow.width < wide.width == functions.spec.width


# Sums in bfloat16 are not among the last ones: a run in bfloat16 rounds by as much itself.
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "dtype"),
    [*((fault, "float32") for fault in FAULTS), *((fault, "bfloat16") for fault in FAULTS[:3])],
)
def test_faults_are_found(peaked, dtype, fault):
    result, text = measure(peaked(dtype), fault)
    print(dtype, fault.__name__, text)
    # A fault of the scorer that depends on the width of its rows shows between two micro-batches first.
    with pytest.raises(SelfTestError, match=r"(sampler and scorer|two micro-batches .*) differ by"):
        selftest.require(result)


@pytest.mark.slow
def test_a_run_tests_itself_and_compiles_nothing_more(folders, tmp_path, capsys):
    """`always` on a CPU: the same run, with one line more; a fault ends it before the first step."""
    config = small(folders)
    config.steps, config.eval.data = 1, ""
    train.run(config, str(tmp_path / "plain"), command=[])
    assert "self-test" not in capsys.readouterr().out  # a CPU, by default
    sizes = [f._cache_size() for f in rollout_programs()]
    config.guard.self_test = "always"
    train.run(config, str(tmp_path / "tested"), command=[])
    assert "self-test: over " in capsys.readouterr().out
    assert [f._cache_size() for f in rollout_programs()] == sizes
    rows = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("plain", "tested")
    ]
    drop = ("time/", "speed/", "memory/")
    plain, tested = ({k: v for k, v in row.items() if not k.startswith(drop)} for row in rows)
    assert plain == tested


def rollout_programs():
    return decode_state.decode_chunk, decode_state.prefill, decode_state.unstack, scoring.score_part


@pytest.mark.slow
def test_a_failed_self_test_ends_the_run_before_a_step(folders, tmp_path, monkeypatch):
    config = small(folders)
    config.steps, config.eval.data, config.guard.self_test = 1, "", "always"
    flip_a_weight(monkeypatch)
    with pytest.raises(
        SelfTestError, match=r"^self-test: log-probs of sampler and scorer differ by "
    ):
        train.run(config, str(tmp_path / "run"), command=[])
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()
