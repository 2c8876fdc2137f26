"""A real model on real problems: our greedy texts are those of `transformers`, and so are the grades.

OPD_JAX_REAL_MODEL=FOLDER python -m pytest -m real tests/evaluation/test_against_transformers.py -s
with SmolLM2-135M-Instruct and the file of GSM8K's test problems: the first 100, in four parts.
"""

import json
import os

import pytest

from configs import evaluate as evaluate_config
from opd_jax.data.files import stream
from opd_jax.evaluation import run as runner
from opd_jax.grading import Grader
from tests.support.real_data import FILES, needs_data

pytestmark = [needs_data, pytest.mark.real, pytest.mark.torch]
TOKENS, PART = 256, 25
FALLBACKS = ("last_number",)  # the model writes no box


def their_texts(folder: str, prompts: list[str]) -> list[str]:
    """Greedy answers of `transformers` in float32; a batch is padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
    width = given["input_ids"].shape[1]
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


@pytest.mark.parametrize("first", range(0, 100, PART))
def test_texts_and_grades(first, tmp_path):
    folder = os.environ.get("OPD_JAX_REAL_MODEL", "")
    assert folder, "set OPD_JAX_REAL_MODEL to the folder of SmolLM2-135M-Instruct"
    problems = [row for _, row in stream(str(FILES["gsm8k"]))][first : first + PART]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    config = evaluate_config.get_config("boxed")
    config.eval.update(
        benchmarks=f"gsm8k={file}", any_size=True, temperature=0.0, samples=1,
        max_response_tokens=TOKENS, fallbacks=FALLBACKS,
    )  # fmt: skip
    runner.run(config, folder, str(tmp_path / "run"), command=[])
    ours = [row for _, row in stream(str(tmp_path / "run" / "eval" / "gsm8k.jsonl"))]
    theirs = their_texts(folder, [row["prompt"] for row in ours])
    with Grader() as grader:
        grades = grader.grade(
            ((text, row["gold"]) for text, row in zip(theirs, ours, strict=True)),
            fallbacks=FALLBACKS,
        )
    same = [text == row["answer"] for text, row in zip(theirs, ours, strict=True)]
    print(
        f"\nproblems {first}-{first + PART - 1}: {sum(same)} of {PART} texts equal; CORRECT "
        f"{sum(g.value == 'CORRECT' for g in grades)}, with an answer "
        f"{sum(g.value != 'UNPARSED' for g in grades)}"
    )
    assert [grade.value for grade in grades] == [row["grade"] for row in ours]
    assert sum(grade.value != "UNPARSED" for grade in grades) > PART // 2
    assert sum(same) >= PART - 1  # a tie of two logits within rounding may part two texts
