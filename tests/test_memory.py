"""At a vocabulary of 152,000 memory grows by activations alone: no array is [tokens, vocabulary]."""

import pytest

from tests.support.memory_152k import CHUNK, SMALL, VOCABULARY, reserved

FEW, MANY = 512, 2048
LOGITS = CHUNK * VOCABULARY * 4  # of one chunk and one model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "chunks"), [("score", 8), ("score with a reference", 8), ("update", 5)]
)
def test_a_token_costs_less_than_25_kB_beyond_activations(case, chunks):
    few, many = (reserved(case, VOCABULARY, tokens) for tokens in (FEW, MANY))
    activations = reserved(case, SMALL, MANY) - reserved(case, SMALL, FEW)
    assert many - few - activations < 25_000 * (MANY - FEW)
    assert few < chunks * LOGITS + activations


@pytest.mark.slow
def test_the_naive_update_holds_logits_more_than_twice():
    few, many = (reserved("naive update", VOCABULARY, tokens) for tokens in (128, 256))
    assert many - few > 2 * 4 * VOCABULARY * 128
