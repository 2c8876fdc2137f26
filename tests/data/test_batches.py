"""Order of the data, prompts through the template, and the layout of golden rows."""

import itertools
import threading
import time
import types

import numpy as np
import pytest

from opd_jax import data
from opd_jax.errors import DataError

SIZE = 12


def problems(size: int = SIZE, split: str = "train"):
    """The first problems of a split."""
    return data.open_problems(f"tiny:{split}", field="data.train", size=size)


def batches_of(seed: int, *, batch: int, shuffle: bool = True, **changes: object):
    return data.make_batches(problems(), batch=batch, seed=seed, shuffle=shuffle, **changes)


def indices(batches, count: int) -> list[list[int]]:
    """The next batches, each as the indices of its problems."""
    return [
        [int(p.id.removeprefix("tiny-train-")) for p in batch]
        for batch in itertools.islice(batches, count)
    ]


def order(seed: int, *, epochs: int = 1, batch: int = 4, **changes: object) -> list[int]:
    batches = batches_of(seed, batch=batch, **changes)
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


def test_two_batches_are_read_ahead_and_the_state_is_that_of_the_last_one_taken():
    read, enough = [], threading.Event()

    def reading(batch):
        read.append([p.id for p in batch])
        if len(read) == 3:
            enough.set()
        return len(read), batch

    batches = batches_of(seed=3, batch=4, read=reading)
    (_, first), state = next(batches), batches.get_state()
    assert enough.wait(10)  # the next two, though nobody has asked
    time.sleep(0.05)
    assert len(read) <= 4
    batches.set_state(state)
    (_, second) = next(batches)
    assert [p.id for p in first + second] == [f"tiny-train-{i}" for i in order(seed=3)[:8]]


def test_batches_hold_the_problems_of_the_split():
    batch = next(data.make_batches(problems(split="sft"), batch=3, seed=0, shuffle=False))
    assert batch == [data.problem("sft", i) for i in range(3)]


@pytest.mark.parametrize("taken", [0, 2, 4])  # before, within and beyond the first epoch of 3
def test_state_resumes_exactly(taken):
    straight = batches_of(1, batch=4)
    for _ in range(taken):
        next(straight)
    state = straight.get_state()
    resumed = batches_of(1, batch=4)
    resumed.set_state(state)
    assert indices(resumed, 7) == indices(straight, 7)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_see_what_one_alone_sees(count):
    alone = indices(batches_of(5, batch=4), 7)
    shards = [indices(batches_of(5, batch=4, shard=(i, count)), 7) for i in range(count)]
    for whole, *parts in zip(alone, *shards, strict=True):
        assert sorted(itertools.chain(*parts)) == sorted(whole)
        assert all(len(part) == 4 // count for part in parts)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused():
    with pytest.raises(DataError, match=r"3 processes; set --config\.rollout\.prompts_per_step=6"):
        batches_of(0, batch=4, shard=(0, 3))


# prompts

PROBLEM = data.Problem(
    "p", prompt="2+{answer}?", solution="so {problem}", answer="4", system="row's"
)


def test_a_style_fills_in_problem_answer_and_solution_once():
    style = data.PromptStyle("<{problem}|{answer}|{solution}> in \\boxed{}")
    assert style.turns(PROBLEM) == ("<2+{answer}?|4|so {problem}> in \\boxed{}", "row's", ())


def test_the_systems_turn_of_the_config_replaces_that_of_the_row():
    assert data.PromptStyle(system="ours").turns(PROBLEM) == ("2+{answer}?", "ours", ())


def test_none_drops_the_systems_turn_of_the_row():
    assert data.PromptStyle(system="none").turns(PROBLEM) == ("2+{answer}?", "", ())


def test_prompts_go_through_the_chat_template():
    def chats(prompts: list[tuple[str, str, tuple]]) -> list[list[int]]:
        """Stands in for the tokenizer's: a token a letter."""
        return [[ord(letter) for letter in f"{system}:{text}"] for text, system, _ in prompts]

    tokenizer = types.SimpleNamespace(chats=chats)
    ids = data.PromptStyle("<{problem}>", "s").prompts([PROBLEM, PROBLEM], tokenizer)
    assert [bytes(row) for row in ids] == [b"s:<2+{answer}?>"] * 2


# golden rows


def test_golden_rows_by_hand():
    tokens, length, mask = data.golden_rows([[5, 6], [7]], [[8, 1], [8, 9, 9, 1]], width=5)
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
        data.golden_rows([[5, 6], [7]], [[8, 1], [8, 9, 9, 1]], width=4)


def test_golden_rows_need_a_solution_for_every_prompt():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        data.golden_rows([[5], [6]], [[1]], width=4)
