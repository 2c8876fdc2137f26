"""A run that a test can afford, with several teachers."""

import dataclasses
import json
import pathlib

import jax

from launch.make_tiny import make_tokenizer
from opd_jax import models
from opd_jax.models import decoder
from tests.support.small_run import small


def make_expert(folders: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A second teacher: of another size, with the same tokenizer."""
    model, _ = models.load(str(folders / "teacher"))
    model = dataclasses.replace(model, num_layers=1)
    models.save(str(folder), model, decoder.init(jax.random.key(7), model), make_tokenizer())
    return folder


def of_teachers(folders: pathlib.Path, tmp_path: pathlib.Path, others: str, **fields: object):
    """A small run with a column `domain` that is math, code, math, code, ..."""
    config = small(folders, "opd")
    rows = [
        {
            "problem": f"Start with {i}, add 2.",
            "answer": str(i + 2),
            "domain": ["math", "code"][i % 2],
        }
        for i in range(24)
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train, config.eval.data = str(file), ""
    config.steps, config.log.gradients = 3, 0
    config.teachers.others = others
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config
