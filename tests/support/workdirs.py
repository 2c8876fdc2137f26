"""Workdirs made by hand, with the files a report reads."""

import json
import pathlib
from typing import Any

from opd_jax import config as configuration

# What strangers may write: markup, a lone surrogate, controls, marks that turn a line, mathtext.
HOSTILE = "</pre><script>alert(1)</script>\"'&$x_1$\ud800\x00\x1b[31m\u202eevil"


def make(
    folder: pathlib.Path,
    rows: list[dict[str, Any]],
    *,
    rollouts: list[dict[str, Any]] | None = None,
    answers: dict[str, dict[str, float]] | None = None,
    **fields: Any,
) -> pathlib.Path:
    """A workdir with these lines; `fields` are of the config, with _ for the dot."""
    config = configuration.default()
    config.student.path = "models/student"
    with config.unlocked():
        for name, value in fields.items():
            section, _, field = name.partition("_")
            config[section][field] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(configuration.to_json(config))
    write(folder / "metrics.jsonl", rows)
    if rollouts is not None:
        write(folder / "rollouts.jsonl", rollouts)
    for name, found in (answers or {}).items():
        file = folder / "eval" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return folder


def write(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def healthy(steps: int = 40) -> list[dict[str, float]]:
    """One rollout in fifty does not end, none repeats."""
    return [row(step, truncated=0.02, repetitive=0.0) for step in range(1, steps + 1)]


def collapsing(steps: int = 60, begin: int = 20) -> list[dict[str, float]]:
    """From step `begin` on, truncation goes in a line of 20 steps from 2 % to 98 %, repetition to half."""
    rows = []
    for step in range(1, steps + 1):
        part = min(max((step - begin) / 20, 0.0), 1.0)
        rows.append(row(step, truncated=0.02 + 0.96 * part, repetitive=0.5 * part))
    return rows


def row(step: int, *, truncated: float, repetitive: float) -> dict[str, float]:
    return {
        "step": step,
        "rollout/truncation_rate": truncated,
        "rollout/repetition_rate": repetitive,
        "rollout/length_mean": 80 + 80 * truncated,
        "rollout/tokens": 5000.0,
        "score/advantage_mean": -0.2 + 0.1 * truncated,
        "score/student_logprob_mean": -0.15,
        "score/teacher_logprob_mean": -0.35 + 0.1 * truncated,
        "score/overlap_ratio": 0.75,
        "score/repeated_token_fraction": repetitive / 2,
        "score/regular_token_advantage": -0.2,
        "optim/grad_norm": 1.0 + step % 3,
        "loss/total": 0.1,
        "time/rollout_s": 1.0,
        "time/update_s": 2.0,
        "time/step_s": 3.0,
        "memory/peak_gib": 1.5,
    }


def rollout(step: int, **changes: Any) -> dict[str, Any]:
    """A line of rollouts.jsonl: four tokens, of which the third was not scored."""
    line = {
        "step": step, "id": "a-1", "sample": 0, "prompt": "What is 1+1?", "response": "1+1=",
        "prompt_ids": [7], "response_ids": [49, 43, 49, 61], "outcome": "budget", "grade": "wrong",
        "correct": False,
        "sampler_logprob": [-0.1, -0.2, -0.3, -0.4], "student_logprob": [-0.1, -0.2, None, -0.4],
        "teacher_logprob": [-0.1, -4.2, None, 0.0], "advantage": [0.0, -4.0, None, 0.4],
    }  # fmt: skip
    return line | changes


def as_bytes(ids: list[int]) -> str:
    """A tokenizer whose ids are the bytes of UTF-8."""
    return bytes(ids).decode("utf-8", "replace")
