"""The readers that fuzz.py tests: each function mutates valid input and reads it."""

import atexit
import contextlib
import functools
import json
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from configs import stable_opd
from opd_jax import config as configuration
from opd_jax import data, models, workdir
from opd_jax.checkpoint import manifest as intact
from opd_jax.config.fields import default
from opd_jax.config.validate import validate
from opd_jax.grading import extract
from opd_jax.grading.boxed import boxed_answer, same_whole_number
from opd_jax.grading.grader import Grade, Grader
from opd_jax.models.safetensors_files import open_tensors
from tests.support.mutated_input import (
    dumped,
    mutated_bytes,
    mutated_json,
    mutated_tree,
    weird,
)
from tests.support.paths import ROOT

STUDENT = ROOT / "opd_jax" / "tiny" / "student"

Reader = Callable[[random.Random, pathlib.Path], None]


def read_config(draw: random.Random, folder: pathlib.Path) -> None:
    """Validate a mutated config, and explain an override that failed."""
    config = stable_opd.get_config("tiny")
    flat = configuration.flatten(json.loads(configuration.to_json(config)))
    with config.unlocked():
        for name in draw.sample(sorted(flat), draw.choice([1, 1, 2, 6])):
            section = config
            *parents, last = name.split(".")
            for parent in parents:
                section = section[parent]
            # `explain` reports what ml_collections itself refuses.
            with section.ignore_type(), contextlib.suppress(OverflowError, TypeError, ValueError):
                section[last] = weird(draw)
    error = ValueError(str(weird(draw)))
    text = str(weird(draw))
    configuration.explain(error, [f"--config.{draw.choice([*flat, text])}={text}"])
    validate(config)


def _copy_mutated(
    draw: random.Random, folder: pathlib.Path, names: tuple[str, ...], *, share: float
) -> None:
    """Copy JSON files of the embedded student, and mutate a share of them."""
    for name in names:
        content = (STUDENT / name).read_bytes()
        if draw.random() < share:
            content = mutated_json(draw, json.loads(content))
        (folder / name).write_bytes(content)


def read_model_config(draw: random.Random, folder: pathlib.Path) -> None:
    """Read config.json and generation_config.json of a model folder."""
    _copy_mutated(draw, folder, ("config.json", "generation_config.json"), share=0.8)
    models.load_config(str(folder))


def read_weights(draw: random.Random, folder: pathlib.Path) -> None:
    """Read a safetensors file with a mutated header or mutated bytes."""
    save_file(
        {"a": np.ones((3, 4), np.float32), "b": np.ones((2,), np.float16)},
        folder / "model.safetensors",
    )
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.7:
        header = mutated_json(draw, json.loads(content[8 : 8 + size]))
        length = len(header) if draw.random() < 0.9 else draw.choice([0, 2**40, 2**63, size])
        content = length.to_bytes(8, "little") + header + content[8 + size :]
    else:
        content = mutated_bytes(draw, content)
    file.write_bytes(content)
    _read_tensors(folder)


def read_index(draw: random.Random, folder: pathlib.Path) -> None:
    """Read the index of sharded safetensors files, which may name files outside its folder."""
    save_file({"a": np.ones((3, 4), np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.ones((2, 2), np.float32)}, folder / "model-2.safetensors")
    index = {
        "metadata": {"total_size": 64},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }
    outside = folder.parent / "outside.safetensors"
    save_file({"a": np.full((3, 4), 7, np.float32)}, outside)
    if draw.random() < 0.2:
        index["weight_map"]["a"] = draw.choice(["../outside.safetensors", str(outside)])  # type: ignore[index]
        content = json.dumps(index).encode()
    else:
        content = mutated_json(draw, index)
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert 7 not in _read_tensors(folder), "a file outside of the folder was read"


def _read_tensors(folder: pathlib.Path) -> set[float]:
    seen: set[float] = set()
    with open_tensors(folder) as tensors:
        for tensor in tensors.values():
            if math.prod(tensor.shape) > 10_000:
                continue  # a reader compares shapes with the model's before it reads
            out = np.empty(tensor.shape, np.float32)
            _ = tensor.dtype
            if tensor.shape and out.size:
                tensor.read_into(out, tuple(slice(None) for _ in tensor.shape))
                seen |= set(out.ravel()[:2].tolist())
    return seen


def read_tokenizer(draw: random.Random, folder: pathlib.Path) -> None:
    """Read tokenizer.json, its config and its chat template."""
    _copy_mutated(draw, folder, ("tokenizer.json", "tokenizer_config.json"), share=0.6)
    template = (STUDENT / "chat_template.jinja").read_bytes()
    if draw.random() < 0.3:
        template = draw.choice(
            [mutated_bytes(draw, template), str(weird(draw)).encode("utf-8", "replace")]
        )
    (folder / "chat_template.jinja").write_bytes(template)
    tokenizer = data.Tokenizer(str(folder))
    ids = tokenizer.chat("Start with 1, add 2.")
    tokenizer.decode(tokenizer.encode("12 + 3 = 15")[:50] + ids[:50])
    tokenizer.end_of_turn()
    tokenizer.added()


ROWS: list[dict[str, Any]] = [
    {"id": str(i), "problem": f"Add {i} and 2.", "solution": f"\\boxed{{{i + 2}}}", "answer": str(i + 2)}
    for i in range(6)
]  # fmt: skip


def read_jsonl(draw: random.Random, folder: pathlib.Path) -> None:
    """Read problems from a JSONL or JSON file."""
    rows = mutated_tree(draw, ROWS)
    rows = rows if isinstance(rows, list) else [rows]
    if draw.random() < 0.5:
        content = b"".join(dumped(draw, row) + b"\n" for row in rows)
        file = folder / draw.choice(["rows.jsonl", "rows.jsonl.gz"])
    else:
        content, file = dumped(draw, rows), folder / "rows.json"
    file.write_bytes(mutated_bytes(draw, content) if draw.random() < 0.5 else content)
    _read_problems(draw, file)


def read_parquet(draw: random.Random, folder: pathlib.Path) -> None:
    """Read problems from a Parquet file with mutated bytes or other column types."""
    file = folder / "rows.parquet"
    table = pa.Table.from_pylist(ROWS)
    if draw.random() < 0.3:
        values: list[Any] = [weird(draw) for _ in ROWS]
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
            table = table.set_column(
                draw.randrange(4), draw.choice(table.column_names), [pa.array(values)]
            )
    pq.write_table(table, file, compression=draw.choice(["none", "snappy", "zstd", "gzip"]))
    if draw.random() < 0.85:
        file.write_bytes(mutated_bytes(draw, file.read_bytes()))
    _read_problems(draw, file)


def _read_problems(draw: random.Random, file: pathlib.Path) -> None:
    problems = data.open_problems(
        str(file), field="data.train", columns=default().data.columns, size=100, need_solution=True,
        need_answer=True, bad_rows=draw.choice(["refuse", "skip"]),
    )  # fmt: skip
    for i in range(min(len(problems), 20)):
        _ = problems[i].prompt


ANSWERS = (
    r"So \boxed{\frac{3}{4}}.", r"\boxed{x^2+1}", "The answer is 12.", r"\boxed{\{1, 2\}}",
    "<think>hm</think> 4.5e33", r"$\boxed{\text{A}}$", r"\boxed{10^{-8}\mathrm{ erg/s}}",
    r"\boxed{1,000}", r"\boxed{\sqrt{2}\pm 3}",
)  # fmt: skip
BOMBS = (
    r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" * 500, "{" * 5000, r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    r"\boxed{__import__('os').system('touch /tmp/pwned')}", "9" * 30_000, r"\frac" * 300, "\ud800\udfff",
)  # fmt: skip


def read_answer(draw: random.Random, folder: pathlib.Path) -> None:
    """Extract the answer of a response, and compare it as far as that needs no math-verify."""
    text = draw.choice(ANSWERS) if draw.random() < 0.8 else draw.choice(BOMBS)
    raw = mutated_bytes(draw, text.encode("utf-8", "surrogatepass"))
    text = raw.decode("utf-8", draw.choice(["replace", "surrogateescape"]))
    names = tuple(draw.sample(extract.FALLBACKS, draw.randrange(len(extract.FALLBACKS) + 1)))
    extract.find(text, names)
    box = boxed_answer(text) or text
    same_whole_number(box, "12")
    extract.number(box)
    extract.parts(box)


@functools.cache
def _grader() -> Grader:
    grader = Grader(workers=1, timeout_s=2.0)
    atexit.register(grader.close)
    return grader


def read_grade(draw: random.Random, folder: pathlib.Path) -> None:
    """Grade a response with math-verify, which runs in a separate process."""
    text = draw.choice(ANSWERS) if draw.random() < 0.9 else draw.choice(BOMBS)
    raw = mutated_bytes(draw, text.encode("utf-8", "surrogatepass"))
    gold = draw.choice(["12", r"\frac{3}{4}", "x^2+1", r"10^{-8}", "1, 2"])
    pair = (raw.decode("utf-8", "replace"), gold)
    (grade,) = _grader().grade([pair], fallbacks=("last_number",), rule=draw.choice(extract.RULES))
    assert isinstance(grade, Grade)


def read_workdir(draw: random.Random, folder: pathlib.Path) -> None:
    """Read a workdir again: config.json, run.json, metrics.jsonl and the manifest of a checkpoint."""
    tree = json.loads(configuration.to_json(default()))
    content = mutated_json(draw, tree)
    (folder / "config.json").write_bytes(content)
    (folder / "run.json").write_bytes(
        mutated_json(draw, {"command": ["x"], "changes": [{"at": "now"}]})
    )
    line = b'{"step": 1, "loss/total": 0.5}\n'
    (folder / "metrics.jsonl").write_bytes(mutated_bytes(draw, line * 5))
    workdir.Lines(folder / "metrics.jsonl", resume_step=3).close()
    step = folder / "checkpoints" / "3"
    (step / "data").mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    (step / "data" / "x").write_text("y")
    intact.seal(step)
    manifest = step / intact.MANIFEST
    whole = manifest.read_bytes()
    manifest.write_bytes(mutated_json(draw, json.loads(whole)))
    intact.damage(step)
    workdir.read_config(folder)
    workdir.check(folder, default(), accept=draw.random() < 0.5)


READERS: dict[str, Reader] = {
    "config": read_config, "config.json": read_model_config, "safetensors": read_weights,
    "index": read_index, "tokenizer": read_tokenizer, "jsonl": read_jsonl, "parquet": read_parquet,
    "answers": read_answer, "grades": read_grade, "workdir": read_workdir,
}  # fmt: skip
