"""Which tokens repeat: tails of flagged rollouts, and n-grams seen before, by hand and by plain loops."""

import numpy as np
import pytest

from launch.make_tiny import make_tokenizer
from opd_jax.metrics import repetition
from opd_jax.types import Outcome, Rollout

pytestmark = pytest.mark.short
PIECES = {1: "", 2: "a", 3: "bc", 4: "def", 5: "ghij"}  # 1 ends a text


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def rows(*responses: list[int], prompts: list[int], outcomes: list[Outcome], width: int) -> Rollout:
    """Prompts of fives, then the responses, then zeros."""
    tokens = np.zeros((len(responses), width), np.int32)
    length = np.array([p + len(r) for p, r in zip(prompts, responses, strict=True)], np.int32)
    for row, prompt, response in zip(tokens, prompts, responses, strict=True):
        row[: prompt + len(response)] = [5] * prompt + response
    return Rollout(
        tokens_BT=tokens, length_B=length, prompt_length_B=np.array(prompts, np.int32),
        sampler_logprob_BT=np.zeros(tokens.shape, np.float32), outcome_B=np.array(outcomes, np.int32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tail", "start"),
    [(1, 4), (2, 3), (3, 3), (4, 2), (6, 2), (7, 1), (8, 1), (9, 0), (10, 0), (11, 0)],
)
def test_tail_start_by_hand(tail, start):
    # a | bc | def | bc | a: the token that holds the first character of the tail
    assert repetition.tail_start([2, 3, 4, 3, 2], tail=tail, decode=decode) == start


def test_tail_start_equals_a_search_from_the_end():
    draw = np.random.default_rng(0)
    for _ in range(200):
        ids = draw.integers(1, 6, draw.integers(1, 40)).tolist()
        tail = int(draw.integers(1, 60))
        enough = [i for i in range(len(ids)) if len(decode(ids[i:])) >= tail]
        assert repetition.tail_start(ids, tail=tail, decode=decode) == max(enough, default=0)


def test_tail_start_of_a_real_tokenizer():
    tokenizer = make_tokenizer()
    for text, late in (("3+4=7, so 7*2=14. " * 20, 0), ("\U0001f600 \u00e9 " * 60, 20)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for tail in (1, 10, 57, 100):
            start = repetition.tail_start(ids, tail=tail, decode=tokenizer.decode)
            exact = max(i for i in range(len(ids)) if len(tokenizer.decode(ids[i:])) >= tail)
            assert exact <= start <= exact + late


def test_tail_mask_by_hand():
    made = rows(
        [4, 3, 2, 2],  # defbcaa: the last three characters are the token bc's c, a and a
        [4, 3, 2, 1],  # defbca and an end: bca
        [4, 3, 2, 2],  # not flagged
        prompts=[2, 1, 2],
        outcomes=[Outcome.BUDGET, Outcome.EOS, Outcome.BUDGET],
        width=7,
    )
    got = repetition.tail_mask(made, np.array([True, True, False]), tail=3, decode=decode)
    assert got.dtype == bool
    assert got.astype(int).tolist() == [
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 0],  # not the end token
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_only_flagged_rollouts_are_decoded():
    seen = []
    made = rows([2] * 4, [3] * 4, prompts=[1, 1], outcomes=[Outcome.BUDGET] * 2, width=5)

    def watched(ids: list[int]) -> str:
        seen.extend(ids)
        return decode(ids)

    repetition.tail_mask(made, np.array([False, True]), tail=3, decode=watched)
    assert set(seen) == {3}
    assert len(seen) <= 4  # each token once at the most


def test_ngram_mask_by_hand():
    made = rows(
        [1, 2, 3, 4, 2, 3, 4, 5],  # 2 3 4 comes again at its second 4; as in the test of the source
        [2, 2, 2, 2, 2, 0, 0, 0],
        [5, 5, 2, 5, 5, 2, 0, 0],  # the prompt is fives too, and does not count
        prompts=[1, 1, 2],
        outcomes=[Outcome.BUDGET] * 3,
        width=10,
    ).replace(length_B=np.array([9, 6, 8], np.int32))
    got = repetition.ngram_mask(made, ngram=3)
    assert got.dtype == bool
    assert [np.flatnonzero(row).tolist() for row in got] == [[7], [4, 5], [7]]
    two = repetition.ngram_mask(made, ngram=2)
    assert [np.flatnonzero(row).tolist() for row in two] == [[6, 7], [3, 4, 5], [6, 7]]


def plain_ngrams(made: Rollout, ngram: int) -> np.ndarray:
    mask = np.zeros(made.tokens_BT.shape, bool)
    for row in range(len(mask)):
        ids, seen = made.response(row), set()
        for end in range(ngram - 1, len(ids)):
            gram = tuple(ids[end - ngram + 1 : end + 1])
            mask[row, made.prompt_length_B[row] + end] = gram in seen
            seen.add(gram)
    return mask


@pytest.mark.parametrize(
    ("ngram", "low", "high"),
    [(2, 0, 5), (3, 0, 4), (5, 0, 3), (3, 151_000, 151_004), (6, 2**30, 2**30 + 3), (30, 0, 2)],
)
def test_ngram_mask_equals_a_plain_loop(ngram, low, high):
    """The last cases need more than 64 bits an n-gram, or are longer than most responses."""
    draw = np.random.default_rng(ngram)
    prompt_B = draw.integers(1, 6, 9)
    tokens_BT = draw.integers(low, high, (9, 50))
    if ngram > 5:
        tokens_BT[:, 25:] = tokens_BT[:, :25]
    made = Rollout(
        tokens_BT=tokens_BT.astype(np.int32),
        length_B=(prompt_B + draw.integers(0, 45, 9)).astype(np.int32),
        prompt_length_B=prompt_B.astype(np.int32),
        sampler_logprob_BT=np.zeros((9, 50), np.float32),
        outcome_B=np.zeros(9, np.int32),
    )
    made.length_B[0] = 50
    got = repetition.ngram_mask(made, ngram=ngram)
    np.testing.assert_array_equal(got, plain_ngrams(made, ngram))
    assert not (got & ~made.response_mask_BT).any()
    if ngram < 30:
        assert got.any()


def test_ngrams_that_differ_beyond_64_bits_are_different():
    """Five digits of base 2^16: the first one's weight is 2^64, which is 0 where numbers wrap."""
    response = [1, 7, 8, 9, 65_535, 2, 7, 8, 9, 65_535]
    made = rows(response, prompts=[1], outcomes=[Outcome.BUDGET], width=11)
    assert not repetition.ngram_mask(made, ngram=5).any()
    assert np.flatnonzero(repetition.ngram_mask(made, ngram=4)[0]).tolist() == [10]


def test_ngrams_longer_than_the_rows_repeat_nothing():
    made = rows([2] * 4, prompts=[1], outcomes=[Outcome.BUDGET], width=5)
    assert not repetition.ngram_mask(made, ngram=6).any()
    assert not repetition.ngram_mask(made, ngram=5).any()


def test_the_rule_picks_the_mask():
    made = rows([2] * 6, prompts=[1], outcomes=[Outcome.BUDGET], width=7)
    options = {"tail": 2, "ngram": 3, "decode": decode}
    by_rule = {
        rule: np.flatnonzero(
            repetition.repeated_mask(made, np.array([True]), rule=rule, **options)[0]
        ).tolist()
        for rule in repetition.RULES
    }
    assert by_rule == {"tail": [5, 6], "ngram": [4, 5, 6]}


def test_repeated_metrics_by_hand():
    advantage = np.array([[-0.1, -0.3, -0.2, np.nan], [-0.02, -0.04, 7.0, 7.0]], np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    repeated = np.array([[0, 0, 0, 1], [1, 1, 1, 0]], bool)  # in part outside what is scored
    got = repetition.repeated_metrics(advantage, mask, repeated)
    assert got == pytest.approx({
        "score/repeated_token_fraction": 2 / 5,
        "score/repeated_token_advantage": -0.03,
        "score/regular_token_advantage": -0.2,
    })  # fmt: skip
    assert repetition.repeated_metrics(None, mask, repeated) == {
        "score/repeated_token_fraction": pytest.approx(0.4)
    }


def test_repeated_metrics_have_no_mean_of_nothing():
    advantage, mask = np.zeros((1, 3), np.float32), np.array([[True, True, False]])
    none, all_ = np.zeros((1, 3), bool), np.ones((1, 3), bool)
    assert repetition.repeated_metrics(advantage, mask, none).keys() == {
        "score/repeated_token_fraction", "score/regular_token_advantage",
    }  # fmt: skip
    assert repetition.repeated_metrics(advantage, mask, all_).keys() == {
        "score/repeated_token_fraction", "score/repeated_token_advantage",
    }  # fmt: skip
    assert repetition.repeated_metrics(advantage, none, all_) == {
        "score/repeated_token_fraction": 0.0
    }
