"""Rollouts of rollouts.jsonl: which to show, their tokens as text, and which tokens repeat."""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np

from opd_jax import metrics
from opd_jax.data import Tokenizer
from opd_jax.errors import ModelError
from opd_jax.metrics import repetition
from opd_jax.report.read import Run, parsed, section_of
from opd_jax.types import Outcome, Rollout

HEAD, TAIL = 500, 300  # tokens shown of a long response
_STEP = re.compile(rb'^\{"step": (\d{1,15}),')
_SCORES = ("student_logprob", "teacher_logprob", "advantage")

Decode = Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class Token:
    """A token as shown. Figures are None where nothing was scored."""

    text: str
    repeated: bool
    student_logprob: float | None
    teacher_logprob: float | None
    advantage: float | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One rollout. `tokens` omits `skipped` tokens after the first `HEAD`.

    `id` names its problem and `number` is its index among the problem's samples; "" and 0 in files
    without them.
    """

    step: int
    id: str
    number: int
    prompt: str
    outcome: str
    correct: bool | None
    length: int
    tokens: list[Token]
    skipped: int


def rollouts(run: Run, count: int, tokenizer: str = "") -> tuple[list[Sample], list[str]]:
    """Return up to `count` rollouts of a run, from its first to its last step, and notes about them.

    `tokenizer`: a folder, in place of the student's own.
    """
    path = run.folder / "rollouts.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return [], ["no rollouts.jsonl, or an empty one: there are no samples (log.rollouts)"]
    steps, places = _index(path)
    if not places:
        return [], ["rollouts.jsonl has no line that can be read: there are no samples"]
    decode, notes = _decoder(run, tokenizer)
    out = []
    with path.open("rb") as file:
        for i in _chosen(steps, count, run):
            file.seek(places[i])
            row = parsed(file.readline())
            if row is not None and (sample := _sample(row, run, decode)) is not None:
                out.append(sample)
    if not out:
        notes = [
            "the lines of rollouts.jsonl are not as train.py writes them: there are no samples"
        ]
    return out, notes


def pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """Return the text that each token adds; of a character in several tokens, the last one adds all of it."""
    out, begin, end = [], 0, 0  # ids[begin:end] are the ids of `prefix`, whose text is in `out`
    prefix = ""
    for i in range(len(ids)):
        text = decode(list(ids[begin : i + 1]))
        if text.endswith("\ufffd") and i + 1 - end < 4 and i + 1 < len(ids):
            out.append("")
            continue
        fits = text.startswith(prefix)  # false after bytes that form no character
        out.append(text[len(prefix) :] if fits else decode(list(ids[end : i + 1])))
        begin, end = end, i + 1
        prefix = decode(list(ids[begin:end]))
    return out


def _index(path: pathlib.Path) -> tuple[list[int], list[int]]:
    """Return step and offset of each complete line; the lines are not parsed."""
    steps, places, place = [], [], 0
    with path.open("rb") as file:
        for line in file:
            match = _STEP.match(line)
            if match and line.endswith(b"\n"):
                steps.append(int(match[1]))
                places.append(place)
            place += len(line)
    return steps, places


def _chosen(steps: Sequence[int], count: int, run: Run) -> list[int]:
    """Choose lines: of the first and the last step, of onset and alarm, and evenly between."""
    first = {step: i for i, step in reversed(list(enumerate(steps)))}  # first rollout of each step
    known = sorted(first)
    ranked = [known[0], known[-1]]
    ranked += [step for step in (run.verdict.onset, run.verdict.alarm) if step in first]
    even = np.linspace(0, len(known) - 1, max(count, 2)).round().astype(int)
    ranked += sorted((known[i] for i in even), key=lambda s: -min(abs(s - r) for r in ranked))
    chosen = sorted(list(dict.fromkeys(ranked))[:count])
    return [first[step] for step in chosen]


def _decoder(run: Run, folder: str) -> tuple[Decode | None, list[str]]:
    path = folder or run.config["student"]["path"]
    try:
        return Tokenizer(path).decode, []
    except ModelError:
        return None, [
            f"the tokenizer {path} is not on this machine, so tokens are shown as their ids in brackets; "
            "--tokenizer=DIR names it"
        ]


def _sample(row: dict[str, Any], run: Run, decode: Decode | None) -> Sample | None:
    ids, prompt_ids, outcome = (row.get(name) for name in ("response_ids", "prompt_ids", "outcome"))
    if not ids or not _is_ids(ids):
        return None
    scores = {name: _figures(row.get(name), len(ids)) for name in _SCORES}
    outcome = outcome if isinstance(outcome, str) else "unknown"
    repeated = np.zeros(len(ids), bool)
    texts = [f"[{i}]" for i in ids]
    if decode is not None:
        texts = pieces(ids, decode)
        repeated = _repeated(
            ids, prompt_ids if _is_ids(prompt_ids) and prompt_ids else [], outcome, run, decode
        )
        if outcome == "eos" and not texts[-1]:
            texts[-1] = "⟨end⟩"
    shown = list(range(len(ids)))
    if len(ids) > HEAD + TAIL:
        shown = [*shown[:HEAD], *shown[-TAIL:]]
    tokens = [
        Token(texts[i], bool(repeated[i]), *(scores[name][i] for name in _SCORES)) for i in shown
    ]
    name, number = row.get("id"), row.get("sample")
    return Sample(
        step=row["step"],
        id=name if isinstance(name, str) else "",
        number=number if type(number) is int else 0,
        prompt=str(row.get("prompt", "")),
        outcome=outcome,
        correct=row["correct"] if isinstance(row.get("correct"), bool) else None,
        length=len(ids),
        tokens=tokens,
        skipped=len(ids) - len(shown),
    )


def _repeated(
    ids: list[int], prompt_ids: list[int], outcome: str, run: Run, decode: Decode
) -> np.ndarray:
    """Return which tokens of a response are repetitive, by the rule of its run."""
    rule = section_of(run.config, "metrics")
    row = [*prompt_ids, *ids]
    outcomes = {one.name.lower(): int(one) for one in Outcome}
    rollout = Rollout(
        tokens_BT=np.array([row]),
        length_B=np.array([len(row)]),
        prompt_length_B=np.array([len(prompt_ids)]),
        sampler_logprob_BT=np.zeros((1, len(row)), np.float32),
        outcome_B=np.array([outcomes.get(outcome, 0)]),
    )
    flagged_B = metrics.flagged([decode(ids)], metrics.make_repetition_rule(rule))
    mask_BT = repetition.repeated_mask(
        rollout, flagged_B, rule=rule["repeated_tokens"], tail=rule["repetition_tail"],
        ngram=rule["repeated_ngram"], decode=decode,
    )  # fmt: skip
    return mask_BT[0, len(prompt_ids) :]


def _is_ids(ids: Any) -> TypeGuard[list[int]]:
    return isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)


def _figures(values: Any, size: int) -> list[float | None]:
    """Return one number per token; None for every value that is not a finite number."""
    items = values if isinstance(values, list) else []
    out = [float(x) if type(x) in (int, float) and abs(x) < 1e9 else None for x in items[:size]]
    return [*out, *itertools.repeat(None, size - len(out))]


def as_json(sample: Sample) -> str:
    """Return the values shown on hover: [student's, teacher's log-prob, advantage] of each token."""
    rows = [[t.student_logprob, t.teacher_logprob, t.advantage] for t in sample.tokens]
    return json.dumps(rows, separators=(",", ":"))
