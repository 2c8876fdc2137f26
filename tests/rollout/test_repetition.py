"""Stopping on repetition: exact against a loop in Python, and free of slots, chunks and neighbours."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import metrics
from opd_jax.errors import DataError
from opd_jax.models import decoder
from opd_jax.rollout.decode_state import Cycles, Slots, _advance_cycles, decode_chunk, empty
from opd_jax.training import batch
from opd_jax.types import Outcome, Rollout, Scores
from tests.conftest import noisy_params, tiny_config
from tests.support import calls

pytestmark = pytest.mark.short

MODEL = tiny_config(num_layers=1, vocab_size=29)
BUDGET, LAST, PERIOD = 30, 6, 4
# With two ids to draw from, random rows run into short cycles by themselves.
FEW = {"vocabulary": 2, "temperature": 2.0, "max_response_tokens": BUDGET, "chunk": 64}
# Prompts that repeat themselves: a response of the same token must not be compared with them.
PROMPTS = [[1] * 7, [1, 0] * 3, [0, 0], [0, 1, 0, 1], *[[i] for i in range(3, 13)]]


def reference(response: Sequence[int], last: int, period: int) -> int | None:
    """Tokens at which a row is stopped: the first n whose last tokens all repeat; None for never."""
    for n in range(1, len(response) + 1):
        for d in range(1, period + 1):
            if n >= last + d and all(response[t] == response[t - d] for t in range(n - last, n)):
                return n
    return None


@pytest.fixture(scope="module")
def params() -> decoder.Params:
    return noisy_params(MODEL)


def roll(params: decoder.Params, prompts: list[list[int]] = PROMPTS, **changes) -> Rollout:
    settings = FEW | {"key": jax.random.key(4)} | changes
    return calls.roll(params, MODEL, prompts, **settings)


@pytest.fixture(scope="module")
def free(params) -> Rollout:
    return roll(params)


def stopped(params: decoder.Params, **changes) -> Rollout:
    return roll(params, **{"stop_on_repetition": LAST, "repetition_period": PERIOD} | changes)


@pytest.mark.parametrize(
    ("response", "stop"),
    [
        ([5] * 7, 7),  # six tokens equal the one before
        ([5] * 6, None),
        ([1, 2] * 4, 8),
        ([1, 2] * 3 + [1], None),
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], 10),
        ([1, 2, 3, 4] * 3, 10),
        ([1, 2, 3, 4, 5] * 3, None),  # a period of five is beyond PERIOD
        ([5, 5, 5, 6, 5, 5, 5, 6, 5, 5], 10),
        ([7] * 5 + [8] + [7] * 7, 13),  # the run starts again
    ],
)
def test_the_reference_and_the_device_by_hand(response, stop):
    """A row fed token by token behind a prompt of its own first token."""
    assert reference(response, LAST, PERIOD) == stop
    prompt = [response[0]] * 5
    state = Slots(
        tokens_BT=jnp.zeros((1, 30), jnp.int32).at[0, :5].set(jnp.array(prompt)),
        logprob_BT=jnp.zeros((1, 30)),
        length_B=jnp.array([5]),
        limit_B=jnp.array([30]),
        live_B=jnp.array([True]),
        ended_B=jnp.array([False]),
        key_B=jax.random.split(jax.random.key(0), 1),
        caches=(),
        cycles=Cycles(jnp.array([5]), jnp.zeros((1, PERIOD), jnp.int32)),
    )
    found = None
    for n, token in enumerate(response, start=1):
        cycles = _advance_cycles(state.cycles, state, jnp.array([token]))
        if found is None and int(cycles.run_BZ.max()) >= LAST:
            found = n
        state = state.replace(
            tokens_BT=state.tokens_BT.at[0, state.length_B[0]].set(token),
            length_B=state.length_B + 1,
            cycles=cycles,
        )
    assert found == stop


def test_rows_end_where_the_reference_says(params, free):
    got = stopped(params)
    ends = [reference(free.response(row), LAST, PERIOD) for row in range(len(PROMPTS))]
    assert sum(end is not None for end in ends) >= 4
    assert sum(end is None for end in ends) >= 2
    for row, end in enumerate(ends):
        assert got.response(row) == free.response(row)[:end]
        assert got.outcome_B[row] == (Outcome.BUDGET if end is None else Outcome.REPETITION)
        kept = slice(got.prompt_length_B[row], got.length_B[row])
        np.testing.assert_allclose(
            got.sampler_logprob_BT[row, kept], free.sampler_logprob_BT[row, kept], atol=1e-5
        )
        assert not got.tokens_BT[row, got.length_B[row] :].any()
        assert not got.sampler_logprob_BT[row, got.length_B[row] :].any()


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "chunk"), [(1, 64), (2, 5), (5, 64), (None, 1)])
def test_slots_refills_and_chunks_change_nothing(params, slots, chunk):
    want, got = stopped(params), stopped(params, slots=slots, chunk=chunk)
    np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)
    np.testing.assert_array_equal(got.length_B, want.length_B)
    np.testing.assert_array_equal(got.outcome_B, want.outcome_B)


def test_off_is_the_default_and_holds_no_state(params, free):
    off = roll(params, stop_on_repetition=0, repetition_period=3)
    for name in ("tokens_BT", "length_B", "sampler_logprob_BT", "outcome_B"):
        np.testing.assert_array_equal(getattr(off, name), getattr(free, name))
    assert (free.outcome_B == Outcome.BUDGET).all()
    unstacked = decoder.Model(MODEL, decoder.unstack(params))
    assert empty(unstacked, 2, 9, 0).cycles is None
    programs = decode_chunk._cache_size()
    roll(params, stop_on_repetition=0, repetition_period=5)
    assert decode_chunk._cache_size() == programs


@pytest.mark.slow
def test_an_end_token_is_eos_and_cannot_close_a_cycle(params):
    """The token that it would have to equal would have ended the row before."""
    free = roll(params, vocabulary=3)
    got = stopped(params, vocabulary=3, stop_ids=(2,), stop_on_repetition=3)
    for row in range(len(PROMPTS)):
        response = free.response(row)
        end = response.index(2) + 1 if 2 in response else BUDGET
        loop = reference(response[:end], 3, PERIOD)
        assert got.response(row) == response[: loop or end]
        assert got.outcome_B[row] == (Outcome.REPETITION if loop else Outcome.EOS)
    assert 0 < (got.outcome_B == Outcome.EOS).sum() < len(PROMPTS)


@pytest.mark.parametrize(("last", "period"), [(-1, 4), (6, 0)])
def test_an_impossible_repetition_is_refused(params, last, period):
    with pytest.raises(DataError, match="stop_on_repetition="):
        roll(params, stop_on_repetition=last, repetition_period=period)


@pytest.mark.slow
def test_a_cycle_that_closes_in_the_last_slot_of_the_budget_is_repetition(params, free):
    ends = [reference(free.response(row), LAST, PERIOD) for row in range(len(PROMPTS))]
    row, end = next((row, end) for row, end in enumerate(ends) if end is not None)
    got = stopped(params, max_response_tokens=end)
    assert got.response_length_B[row] == end
    assert got.outcome_B[row] == Outcome.REPETITION
    shorter = stopped(params, max_response_tokens=end - 1)
    assert shorter.outcome_B[row] == Outcome.BUDGET


def test_repetition_is_not_truncation_and_is_written_by_its_name(free):
    few = jax.tree.map(lambda x: x[:3], free)
    few = few.replace(outcome_B=np.array([Outcome.EOS, Outcome.BUDGET, Outcome.REPETITION]))
    assert metrics.truncated(few.outcome_B).tolist() == [False, True, False]
    nothing = np.zeros(few.tokens_BT.shape, np.float32)
    scores = Scores(student_logprob_BT=nothing, student_entropy_BT=nothing)
    lines = batch.as_lines(1, few, scores, nothing, count=3, decode=str, ids=["a"])
    assert [line["outcome"] for line in lines] == ["eos", "budget", "repetition"]
