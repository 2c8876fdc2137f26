"""A real checkpoint against transformers on torch: logits, greedy text, export. SmolLM2-135M-Instruct.

OPD_JAX_REAL_MODEL=FOLDER python -m pytest -m real tests/models/test_real_model.py -s

Not in the default selection; selected without the folder, or without torch, it fails.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import checkpoint, data, models, workdir
from opd_jax import config as configuration
from opd_jax.checkpoint.export import export
from opd_jax.models import decoder
from opd_jax.rollout import generate
from opd_jax.types import TrainState
from tests.models.test_hf_load import assert_same_trees

pytestmark = pytest.mark.real
NEW_TOKENS = 64
QUESTIONS = [
    "Lena picks 14 apples and gives a third of the remaining 12 pears away. How many pears are left?",
    "A bus has 38 passengers. At one stop 9 get off and 5 get on. How many passengers are there now?",
    "Tom reads 15 pages a day. How many days does he need for a book of 240 pages?",
    "A shirt costs $24 and is sold at a discount of 25%. What does it cost now?",
    "Mia has three times as many stickers as Ben. Together they have 48. How many does Mia have?",
    "A farmer has 7 cows. Each gives 12 litres of milk a day. How many litres is that in a week?",
    "A train goes 180 km in 2.5 hours. What is its speed in km per hour?",
    "Sara bakes 5 trays of 18 cookies and 13 of them burn. How many good cookies does she have?",
    "A rectangular garden is 9 m by 14 m. How many metres of fence go around it?",
    "Jack saves $6 a week. After how many weeks can he buy a game that costs $45?",
    "A tank holds 320 litres. It loses 4 litres an hour. How much is in it after a day?",
    "There are 26 pupils. Each needs 3 pencils and pencils come in boxes of 10. How many boxes?",
    "Anna runs 4 km on each weekday and 7 km on Saturday. How far does she run in two weeks?",
    "A pizza is cut into 8 slices. Five friends eat 3 slices each. How many pizzas do they need?",
    "Paul is 4 years older than Kim. In 6 years he will be 20. How old is Kim now?",
    "A shop sells 45 bulbs on Monday and twice as many on Tuesday. How many on both days?",
    "One lap takes 90 seconds. How many laps does a skater do in 12 minutes?",
    "A box of 24 eggs costs $6. What do 10 eggs cost?",
    "Nora has 5 quarters, 3 dimes and 2 nickels. How many cents does she have?",
    "A rope of 63 m is cut into 2 pieces, one twice as long as the other. How long is the shorter?",
]


@pytest.fixture(scope="module")
def folder() -> str:
    path = os.environ.get("OPD_JAX_REAL_MODEL", "")
    if not path:
        pytest.fail("OPD_JAX_REAL_MODEL is not set; set it to the folder of SmolLM2-135M-Instruct")
    return path


@pytest.fixture(scope="module")
def ours(folder):
    """(config, params) in float32."""
    return models.load(folder, np.float32)


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    """The questions through the chat template, as the tokenizer of the folder renders it."""
    tokenizer = data.Tokenizer(folder)
    prompts = [tokenizer.chat(question) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) > 5
    return prompts


def theirs_of(folder: str):
    """The folder's model in transformers, float32 on CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def theirs(folder):
    return theirs_of(folder)


def their_logits(model, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def their_text(model, prompt: list[int]) -> list[int]:
    """Greedy response ids, the end token included, one prompt at a time: no padding."""
    import torch

    with torch.no_grad():
        row = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS, do_sample=False,
        )  # fmt: skip
    return row[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def their_texts(theirs, prompts) -> list[list[int]]:
    return [their_text(theirs, prompt) for prompt in prompts]


def test_logits(ours, theirs, prompts):
    """Per prompt max |a - b| / max |b| over all positions and the whole vocabulary, under 1e-3."""
    config, params = ours
    width = max(map(len, prompts))
    tokens = np.zeros((1, width), np.int32)
    forward = jax.jit(decoder.forward, static_argnames="config")
    worst = []
    for prompt in prompts:
        tokens[0, : len(prompt)] = prompt
        got = np.asarray(forward(params, config, jnp.asarray(tokens), jnp.array([len(prompt)])))
        want = their_logits(theirs, prompt)
        worst.append(np.abs(got[0, : len(prompt)] - want).max() / np.abs(want).max())
    print(f"\nlogits: max |a-b| / max |b|, worst of {len(worst)} prompts: {max(worst):.2e}")
    assert max(worst) < 1e-3


def test_greedy_text(ours, theirs, prompts, their_texts):
    """The same ids; where they part, it must be a tie within the error of float32 logits."""
    config, params = ours
    rollout = generate(
        params, config, prompts, key=jax.random.key(0), max_response_tokens=NEW_TOKENS,
        temperature=0.0, stop_ids=config.eos_token_ids,
    )  # fmt: skip
    same = 0
    for i, (prompt, want) in enumerate(zip(prompts, their_texts, strict=True)):
        got = rollout.response(i)
        if got == want:
            same += 1
            continue
        first = next(t for t in range(NEW_TOKENS) if got[t : t + 1] != want[t : t + 1])
        logits = their_logits(theirs, prompt + want[:first])[-1]
        gap = logits[want[first]] - logits[got[first]]
        print(f"\nprompt {i} parts at token {first}: {want[first]} over {got[first]} by {gap:.1e}")
        error = 2e-5 * np.abs(logits).max()  # both logits may be off by 1e-5 of the largest
        assert gap < error, f"prompt {i} differs at token {first}, and it is no tie: {gap}"
    print(f"\ngreedy: {same} of {len(prompts)} prompts the same for up to {NEW_TOKENS} tokens")
    assert same >= len(prompts) - 2


def test_export_gives_the_same_text(folder, ours, prompts, their_texts, tmp_path):
    """Checkpoint -> export -> transformers: the same bytes of weights, and the same text."""
    from transformers import AutoTokenizer

    run = tmp_path / "run"
    config = configuration.default()
    config.student.path = folder
    workdir.create(run, config, [])
    state = TrainState(step=np.int32(3), params=ours[1], opt_state=())
    with checkpoint.Checkpoints(run, keep=1) as saved:
        problems = data.open_problems("tiny:train", field="data.train", size=4)
        batches = data.make_batches(problems, batch=1, seed=0, shuffle=True)
        saved.save(3, state, batches, guard="")
    assert export(str(run), str(tmp_path / "out")) == 3
    assert_same_trees(models.load(str(tmp_path / "out"))[1], ours[1])
    exported = theirs_of(str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for question, prompt in zip(QUESTIONS, prompts, strict=True):
        turn = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert tokenizer.encode(rendered, add_special_tokens=False) == prompt
    for prompt, want in list(zip(prompts, their_texts, strict=True))[::5]:  # 10 s each
        assert their_text(exported, prompt) == want
