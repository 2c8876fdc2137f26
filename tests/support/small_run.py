"""A run that a test can afford, and what it leaves."""

import json
import pathlib

from opd_jax import config as configuration

METHODS = {"opd": (1.0, 0.0, 0.0), "stable_opd": (1.0, 0.1, 0.05), "sft": (0.0, 1.0, 0.0)}


def small(folders: pathlib.Path, method: str = "stable_opd"):
    """A run of seconds: 4 prompts x 2 rollouts of 124 tokens at most."""
    config = configuration.default()
    config.student.path = str(folders / "student")
    config.teacher.path = str(folders / "teacher")
    config.steps = 4
    config.rollout.prompts_per_step = 4
    config.data.size = 256  # problems; longer ones come later
    config.rollout.samples_per_prompt = 2
    config.rollout.max_prompt_tokens = 36
    config.rollout.max_response_tokens = 124
    config.scoring.token_chunk = config.optim.token_chunk = 256
    config.loss.pg_weight, config.loss.lambda_gold, config.loss.beta_kl = METHODS[method]
    config.optim.learning_rate = 1e-2
    config.optim.microbatch_tokens = 640
    config.checkpoint.every = 2
    config.eval.problems = 4
    config.metrics.repetition_tail = 20
    config.metrics.repetition_threshold = 2.0
    config.metrics.positions = (16, 64, 1000)
    return config


def lines(workdir: pathlib.Path, name: str) -> list[dict]:
    return lines_of(workdir / name)


def lines_of(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def without_times(rows: list[dict]) -> list[dict]:
    drop = ("time/", "speed/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows]


def questions(folder: pathlib.Path, count: int = 12, **more: object) -> str:
    """A file of problems without solutions or answers."""
    rows = [{"problem": f"Start with {i}, add 2.", **more} for i in range(count)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
