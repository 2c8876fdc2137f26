"""Generation: the sampler agrees with the scorer, and slots, chunks and neighbours change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import scoring
from opd_jax.errors import DataError
from opd_jax.models import Model, decoder
from opd_jax.rollout import (
    Batching,
    SamplingParams,
    decode_state,
    generate,
    row_keys,
    sample_responses,
)
from opd_jax.rollout.decode_state import decode_chunk, prefill
from opd_jax.rollout.generate import Shapes, _assign, _prefill_counts, _to_admit
from opd_jax.types import Outcome, Rollout
from tests.conftest import noisy_params, tiny_config
from tests.support import calls
from tests.support.lanes import slow

pytestmark = pytest.mark.short

QWEN2 = tiny_config(num_layers=2, vocab_size=29)
QWEN3 = tiny_config(
    model_type="qwen3", num_layers=2, vocab_size=29, qkv_bias=False, qk_norm=True, head_dim=12
)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4, 5], [12, 13], [14, 15, 16, 17], [18, 19]]
BUDGET, WIDTH = 9, 5
KEY = jax.random.key(2)  # with it a row that ends is followed by one that does not
STOPS = (1, 2)


@pytest.fixture(scope="module")
def params() -> decoder.Params:
    return noisy_params(QWEN2)


def roll(params, prompts=PROMPTS, *, config=QWEN2, **changes) -> Rollout:
    settings = {"key": KEY, "max_response_tokens": BUDGET, "stop_ids": STOPS, "chunk": 64}
    return calls.roll(params, config, prompts, **settings | changes)


@pytest.fixture(scope="module")
def plain(params) -> Rollout:
    return roll(params)


def assert_same_rows(got: Rollout, want: Rollout, rows: slice = slice(None)) -> None:
    """Same responses, outcomes and log-probs; the width of the padding may differ."""
    shared = min(got.tokens_BT.shape[1], want.tokens_BT.shape[1])
    np.testing.assert_array_equal(got.length_B, want.length_B[rows])
    np.testing.assert_array_equal(got.outcome_B, want.outcome_B[rows])
    for array, other in (
        (got.tokens_BT, want.tokens_BT[rows]),
        (got.sampler_logprob_BT, want.sampler_logprob_BT[rows]),
    ):
        np.testing.assert_allclose(array[:, :shared], other[:, :shared], atol=1e-5)
        assert not array[:, shared:].any()
        assert not other[:, shared:].any()


def test_rows_are_prompt_response_padding(plain):
    assert plain.tokens_BT.shape == plain.sampler_logprob_BT.shape == (7, WIDTH + BUDGET)
    assert (np.diff(plain.outcome_B) > 0).any()  # EOS before BUDGET: a reused slot must forget
    for row, prompt in enumerate(PROMPTS):
        response = plain.response(row)
        assert plain.prompt(row) == prompt
        assert 1 <= len(response) <= BUDGET
        assert not set(response[:-1]) & set(STOPS)
        ended = response[-1] in STOPS
        assert plain.outcome_B[row] == (Outcome.EOS if ended else Outcome.BUDGET)
        assert ended or len(response) == BUDGET
        assert not plain.tokens_BT[row, plain.length_B[row] :].any()
    outside = ~plain.response_mask_BT
    assert not plain.sampler_logprob_BT[outside].any()
    assert (plain.sampler_logprob_BT[~outside] < 0).all()


@pytest.mark.parametrize("config", [QWEN2, *slow(QWEN3)], ids=["qwen2", "qwen3"])
def test_sampler_and_scorer_agree(config):
    params = noisy_params(config)
    rollout = roll(params, config=config, slots=3, chunk=4, temperature=0.8, top_p=0.9)
    tokens, length = jnp.asarray(rollout.tokens_BT), jnp.asarray(rollout.length_B)
    mask, sampled = rollout.response_mask_BT, rollout.sampler_logprob_BT
    assert mask.sum() > 30
    scored = np.asarray(scoring.token_logprob(params, config, tokens, length))
    np.testing.assert_allclose(scored[mask], sampled[mask], atol=1e-4)
    # Other neighbours, another order, more padding.
    wider = jnp.pad(tokens[4:0:-1], ((0, 0), (0, 3)))
    scored = np.asarray(scoring.token_logprob(params, config, wider, length[4:0:-1]))[:, :-3]
    np.testing.assert_allclose(scored[mask[4:0:-1]], sampled[4:0:-1][mask[4:0:-1]], atol=1e-4)


def test_the_short_form_is_the_long_one(params, plain):
    got = generate(
        params, QWEN2, PROMPTS, key=KEY, max_response_tokens=BUDGET, temperature=1.0, top_p=1.0,
        stop_ids=list(STOPS), slots=3,
    )  # fmt: skip
    assert_same_rows(got, plain)


@pytest.mark.parametrize(("slots", "chunk"), [(3, 4), *slow((None, 4), (1, 64), (5, 64), (100, 1))])
def test_slots_and_chunks_change_nothing(params, plain, slots, chunk):
    assert_same_rows(roll(params, slots=slots, chunk=chunk), plain)


@pytest.mark.slow
def test_noise_drawn_ahead_is_that_of_each_step(params, plain, monkeypatch):
    monkeypatch.setattr(decode_state, "_NOISE_AHEAD", 0)
    assert_same_rows(roll(params, chunk=63), plain)  # another chunk, so that it is compiled anew


@pytest.mark.slow
def test_wider_prompts_change_only_the_padding(params, plain):
    wider = roll(params, max_prompt_tokens=WIDTH + 3)
    assert wider.tokens_BT.shape == (7, WIDTH + 3 + BUDGET)
    assert_same_rows(wider, plain)


def test_row_i_uses_key_i(params, plain):
    assert_same_rows(roll(params, PROMPTS[:3]), plain, slice(3))
    assert plain.response(0) != plain.response(3)  # the same prompt, another row
    again, other = roll(params), roll(params, key=jax.random.key(8))
    np.testing.assert_array_equal(again.tokens_BT, plain.tokens_BT)
    assert (other.tokens_BT != plain.tokens_BT).any()


def test_greedy_is_argmax_step_by_step(params):
    greedy = roll(params, temperature=0.0, stop_ids=())
    forward = jax.jit(decoder.forward, static_argnames="config")
    rows = greedy.tokens_BT * (np.arange(WIDTH + BUDGET) < greedy.prompt_length_B[:, None])
    for step in range(BUDGET):
        position = greedy.prompt_length_B + step
        logits = np.asarray(forward(params, QWEN2, jnp.asarray(rows), jnp.asarray(position)))
        rows[np.arange(7), position] = logits[np.arange(7), position - 1].argmax(-1)
    np.testing.assert_array_equal(greedy.tokens_BT, rows)


@pytest.mark.slow
def test_an_end_token_in_the_last_slot_of_the_budget_is_eos(params):
    free = roll(params, stop_ids=())
    assert (free.outcome_B == Outcome.BUDGET).all()
    assert (free.response_length_B == BUDGET).all()
    row, last = next(
        (row, free.response(row)[-1])
        for row in range(7)
        if free.response(row)[-1] not in free.response(row)[:-1]
    )
    stopped = roll(params, stop_ids=(last,))
    assert stopped.response(row) == free.response(row)
    assert stopped.outcome_B[row] == Outcome.EOS


@pytest.mark.slow
def test_vocabulary_limits_what_is_sampled(params):
    rollout = roll(params, vocabulary=10, stop_ids=(), temperature=3.0)
    sampled = rollout.tokens_BT[rollout.response_mask_BT]
    assert sampled.max() == 9
    scored = scoring.token_logprob(
        params, QWEN2, jnp.asarray(rollout.tokens_BT), jnp.asarray(rollout.length_B), vocabulary=10
    )
    mask = rollout.response_mask_BT
    np.testing.assert_allclose(
        np.asarray(scored)[mask], rollout.sampler_logprob_BT[mask], atol=1e-4
    )


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "no prompts"),
        ([[3], []], {}, "prompt 1 has 0 tokens"),
        ([[3, 4, 5]], {"max_prompt_tokens": 2}, "prompt 0 has 3 tokens"),
        ([[3] * 250], {}, r"prompt \(250\) \+ response \(9\) .* 256 positions"),
        ([[3]], {"max_prompt_tokens": 250}, r"256 positions"),
    ],
)
def test_impossible_prompts_are_refused(params, prompts, changes, message):
    with pytest.raises(DataError, match=message) as error:
        roll(params, prompts, **changes)
    assert "\n" not in str(error.value)


def test_other_prompts_of_the_same_count_do_not_compile_again(params, plain):
    compiled = decode_chunk._cache_size(), prefill._cache_size()
    assert min(compiled) > 0
    roll(params, [[20, 21], [22] * 5, [23], [24], [25], [26], [27]], key=jax.random.key(9))
    assert (decode_chunk._cache_size(), prefill._cache_size()) == compiled


def test_a_smaller_budget_in_the_same_rows_compiles_nothing_and_ends_the_same_responses_earlier(
    params, plain
):  # fmt: skip
    compiled = decode_chunk._cache_size(), prefill._cache_size()
    short = roll(params, max_response_tokens=4, largest_budget=BUDGET)
    assert (decode_chunk._cache_size(), prefill._cache_size()) == compiled
    assert short.tokens_BT.shape == plain.tokens_BT.shape
    for row in range(len(PROMPTS)):
        assert short.response(row) == plain.response(row)[:4]
    with pytest.raises(
        DataError, match=r"max_response_tokens=10 is more than the 9 response tokens"
    ):
        roll(params, max_response_tokens=BUDGET + 1, largest_budget=BUDGET)


@pytest.mark.slow
def test_a_budget_for_each_prompt(params, plain):
    """A row with a smaller budget is the beginning of the row with the whole one; slots do not matter."""
    budgets = [9, 1, 4, 9, 2, 7, 3]
    for slots in (None, 2):
        got = roll(params, max_response_tokens=budgets, slots=slots, chunk=2)
        assert got.tokens_BT.shape == plain.tokens_BT.shape
        for row, budget in enumerate(budgets):
            assert got.response(row) == plain.response(row)[:budget]
            ended = len(plain.response(row)) <= budget and plain.outcome_B[row] == Outcome.EOS
            assert got.outcome_B[row] == (Outcome.EOS if ended else Outcome.BUDGET)


@pytest.mark.slow
def test_short_prompts_are_prefilled_in_narrow_rows(params, plain):
    """Quarters of the width: prompts of up to 2 of 5 tokens take rows of 2."""
    wide = prefill._cache_size()
    short = roll(params, [[6], [12, 13]], max_prompt_tokens=WIDTH)
    again = roll(params, [[6], [12, 13]])
    assert_same_rows(short, again)
    assert prefill._cache_size() > wide


@pytest.mark.parametrize(
    ("prompts", "slots", "replicas"),
    [(64, 64, 1), (70, 70, 1), (64, 16, 1), (256, 256, 4), (250, 250, 4), (3, 8, 4), (40, 33, 2)],
)
def test_the_prefill_batches_that_are_listed_are_those_that_are_met(prompts, slots, replicas):
    """Every row ends after one chunk, or only the first row of a replica does."""
    shapes = Shapes.of(
        prompts, slots=slots, prompt_tokens=512, response_tokens=64, chunk=None, replicas=replicas
    )
    for ending in (shapes.slots, 1):
        met = set()
        owner = np.full((replicas, shapes.slots), -1)
        waiting = list(range(prompts))[::-1]
        while waiting or (owner >= 0).any():
            while (count := _to_admit(shapes, owner, len(waiting))) > 0:
                met.add(count)
                _assign(owner, waiting, count)
            owner[:, :ending] = -1
            owner = np.sort(owner, axis=1)[:, ::-1].copy()  # those that go on come first
        assert met <= set(_prefill_counts(shapes, prompts))
        if prompts <= slots:
            assert met == set(_prefill_counts(shapes, prompts))


def test_prompt_widths_on_a_gpu_are_multiples_of_128(params, plain):
    def widths(prompt: int, response: int, tile: int) -> tuple[int, ...]:
        return Shapes.of(
            8, slots=None, prompt_tokens=prompt, response_tokens=response, chunk=None, tile=tile
        ).prompt_widths

    assert widths(1024, 8192, 128) == (256, 512, 768, 1024)
    assert widths(1000, 8192, 128) == (256, 512, 768, 1024)
    assert widths(200, 8192, 128) == (128, 256)
    assert widths(200, 8192, 1) == (50, 100, 150, 200)
    assert widths(64, 32, 128) == (96,)  # no wider than the row
    assert_same_rows(roll(params, tile=4), plain)


def test_a_width_for_larger_budgets_changes_only_the_padding(params, plain):
    with pytest.raises(DataError, match="more than the 4 response tokens"):
        sample_responses(
            Model(QWEN2, params), PROMPTS, SamplingParams(BUDGET), keys=row_keys(KEY, len(PROMPTS)),
            batching=Batching(largest_budget=4),
        )  # fmt: skip
    roomy = sample_responses(
        Model(QWEN2, params), PROMPTS, SamplingParams(BUDGET, stop_ids=STOPS),
        keys=row_keys(KEY, len(PROMPTS)), batching=Batching(largest_budget=BUDGET + 3),
    )  # fmt: skip
    assert roomy.tokens_BT.shape[1] == WIDTH + BUDGET + 3
    assert_same_rows(roomy, plain)
