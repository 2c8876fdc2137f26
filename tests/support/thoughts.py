"""Problems, templates and responses with thoughts, for tests at the seam of prompt and response."""

import json
import pathlib

import numpy as np

from configs import evaluate as evaluate_config
from opd_jax import data
from opd_jax.types import Outcome, Rollout
from tests.support.small_run import small

THOUGHTS = "<think>\n1+2=3.\n</think>\n\n\\boxed{3}"


def write(file: pathlib.Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def problems(file: pathlib.Path, *solutions: str, **more: object) -> str:
    rows = [
        {"id": f"p{i}", "problem": "Start with 1, add 2.", "solution": text, "answer": "3", **more}
        for i, text in enumerate(solutions)
    ]
    return write(file, "".join(json.dumps(row) + "\n" for row in rows))


def sft(folders, tmp_path, template: str, *solutions: str):
    config = small(folders, "sft")
    config.student.chat_template = write(tmp_path / "student.jinja", template)
    config.rollout.max_prompt_tokens = 60
    config.rollout.max_response_tokens = 100
    config.data.train, config.eval.data = problems(tmp_path / "data.jsonl", *solutions), ""
    return config


def rollout_of(prompts, responses, end: int) -> Rollout:
    made = [[*p, *r, end] for p, r in zip(prompts, responses, strict=True)]
    tokens = np.zeros((len(made), max(map(len, made))), np.int32)
    for i, ids in enumerate(made):
        tokens[i, : len(ids)] = ids
    return Rollout(
        tokens_BT=tokens, length_B=np.array(list(map(len, made))),
        prompt_length_B=np.array(list(map(len, prompts))),
        sampler_logprob_BT=np.zeros(tokens.shape, np.float32),
        outcome_B=np.full(len(made), Outcome.EOS),
    )  # fmt: skip


RESPONSE = THOUGHTS.removeprefix("<think>\n")


def writes(tokenizer: data.Tokenizer):
    """In place of `sample_responses`: every response is RESPONSE and the end token."""

    def sample_responses(model, prompts, sampling, **_):
        ids = [tokenizer.encode(RESPONSE)] * len(prompts)
        return rollout_of(prompts, ids, tokenizer.end_of_turn())

    return sample_responses


def evaluation():
    config = evaluate_config.get_config()
    config.eval.problems, config.eval.samples, config.eval.batch = 2, 1, 2
    config.eval.max_response_tokens = 40
    return config
