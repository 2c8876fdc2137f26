"""Order of the data, prompts through the template, and the layout of golden rows."""

import itertools
import types

import numpy as np
import pytest

from opd_jax import data
from opd_jax.config import default
from opd_jax.data import loader
from opd_jax.errors import ConfigError, DataError

SIZE = 12


def section(**changes: object):
    """The config section `data`, of 12 problems."""
    made = default().data
    made.update({"size": SIZE} | changes)
    return made


def indices(batches, count: int) -> list[list[int]]:
    """The next batches, each as the indices of its problems."""
    return [
        [int(p.id.removeprefix("tiny-train-")) for p in batch]
        for batch in itertools.islice(batches, count)
    ]


def order(seed: int, *, epochs: int = 1, batch: int = 4, **changes: object) -> list[int]:
    batches = data.make_batches(section(**changes), batch=batch, seed=seed)
    return list(itertools.chain(*indices(batches, epochs * SIZE // batch)))


def test_an_epoch_visits_each_problem_once():
    seen = order(seed=0, epochs=3)
    epochs = [seen[i : i + SIZE] for i in range(0, len(seen), SIZE)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(SIZE))] * 3
    assert epochs[0] != epochs[1] != epochs[2]  # each in an order of its own


def test_batches_run_on_over_the_end_of_an_epoch():
    assert sorted(order(seed=0, epochs=5, batch=5)) == sorted(list(range(SIZE)) * 5)


def test_order_depends_on_the_seed_alone():
    assert order(seed=3) == order(seed=3)
    assert order(seed=3) != order(seed=4)
    assert order(seed=3) == order(seed=3, batch=6)
    assert order(seed=3, shuffle=False) == list(range(SIZE))


def test_batches_hold_the_problems_of_the_split():
    batch = next(data.make_batches(section(train="tiny:sft", shuffle=False), batch=3, seed=0))
    assert batch == [data.problem("sft", i) for i in range(3)]


@pytest.mark.parametrize("taken", [0, 2, 4])  # before, within and beyond the first epoch of 3
def test_state_resumes_exactly(taken):
    straight = data.make_batches(section(), batch=4, seed=1)
    for _ in range(taken):
        next(straight)
    state = straight.get_state()
    resumed = data.make_batches(section(), batch=4, seed=1)
    resumed.set_state(state)
    assert indices(resumed, 7) == indices(straight, 7)


def test_unknown_split_is_a_config_error():
    assert data.split_of("tiny:sft", field="data.train") == "sft"
    for name in ("tiny:nosuch", "tiny", "train", "other:train"):
        with pytest.raises(ConfigError, match=r"^data\.train='" + name + "', wanted one of tiny:"):
            data.make_batches(section(train=name), batch=2, seed=0)


# prompts

PROBLEM = data.Problem(id="tiny-train-5", prompt="abc", solution="", answer="")


def letters(text: str, *, template: str, system: str) -> list[int]:
    """Stands in for Tokenizer.chat: a token a letter."""
    return [ord(letter) for letter in system + template.replace("{problem}", text)]


TOKENIZER = types.SimpleNamespace(chat=letters)


def test_prompt_fills_template_and_system():
    ids = data.prompt_ids(
        PROBLEM, TOKENIZER, section(prompt_template="<{problem}>", system_prompt="s"), 6
    )
    assert bytes(ids) == b"s<abc>"


def test_a_prompt_too_long_names_the_field():
    message = (
        r"problem tiny-train-5: its prompt has 3 tokens, wanted 1 to rollout\.max_prompt_tokens=2; "
        r"set --config\.rollout\.max_prompt_tokens=3"
    )
    with pytest.raises(DataError, match=message):
        data.prompt_ids(PROBLEM, TOKENIZER, section(), 2)
    assert len(data.prompt_ids(PROBLEM, TOKENIZER, section(), 3)) == 3


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="its prompt has 0 tokens"):
        data.prompt_ids(PROBLEM, TOKENIZER, section(prompt_template=""), 5)


# golden rows


def test_golden_rows_by_hand():
    tokens, length, mask = loader.golden_rows([[5, 6], [7]], [[8, 1], [8, 9, 9, 1]], width=5)
    np.testing.assert_array_equal(tokens, [[5, 6, 8, 1, 0], [7, 8, 9, 9, 1]])
    np.testing.assert_array_equal(length, [4, 5])
    np.testing.assert_array_equal(mask, np.array([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]], bool))
    assert (tokens.dtype, length.dtype, mask.dtype) == (np.int32, np.int32, bool)


def test_golden_row_too_long_names_the_field():
    message = (
        "golden row 1: prompt and solution have 5 tokens, more than 4; "
        r"raise --config\.rollout\.max_response_tokens"
    )
    with pytest.raises(DataError, match=message):
        loader.golden_rows([[5, 6], [7]], [[8, 1], [8, 9, 9, 1]], width=4)


def test_golden_rows_need_a_solution_for_every_prompt():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        loader.golden_rows([[5], [6]], [[1]], width=4)
