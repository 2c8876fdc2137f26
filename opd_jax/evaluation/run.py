"""launch/evaluate.py: evaluate a model on several benchmarks, keep every answer, and print the table.

Each answer is sampled with its own key, derived from (seed, prompt, sample), in batches with fixed
members. So a killed and resumed evaluation writes the same answer files, byte for byte, as an
uninterrupted one; slots, batches and the order of the problems change answers only through rounding.
"""

import datetime
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import data, hardware, metrics, models, workdir
from opd_jax.config.validate import validate_evaluation
from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.evaluation import protocols
from opd_jax.evaluation import table as results
from opd_jax.evaluation.subject import Subject, open_subject
from opd_jax.evaluation.tasks import Task, answer_keys, budget, make_tasks
from opd_jax.grading.extract import find, letters
from opd_jax.grading.grader import Grader, make_grader
from opd_jax.rollout import Batching, SamplingParams, read_responses, sample_responses
from opd_jax.types import Outcome
from opd_jax.workdir import atomic, console
from opd_jax.workdir.jsonl import JsonlFile

# Prefixes of the fields on which answers or figures depend.
_TOUCHES = ("seed", "student.", "data.prompt_template", "data.system_prompt", "data.columns.",
            "eval.samples", "eval.temperature", "eval.top_", "eval.problems", "eval.max_response_tokens",
            "eval.fallbacks", "grading.grader", "eval.batch", "eval.any_size",
            "metrics.repetition_")  # fmt: skip


def run(
    config: ConfigDict, model: str, folder: str, *, step: int | None = None, command: list[str]
) -> dict[str, Any]:
    """Run an evaluation in the workdir `folder`, or resume it there; return the content of results.json.

    Raises an OpdError for errors that the user can correct. All inputs are checked before weights are
    read.
    """
    validate_evaluation(config)
    config = config.copy_and_resolve_references()
    config.eval.max_response_tokens = budget(config)
    known = sorted({row["backbone"] for row in results.baselines()})
    if config.eval.backbone and config.eval.backbone not in known:
        raise ConfigError(
            f"eval.backbone={config.eval.backbone!r} has no figures of papers; set it to one of "
            f"{', '.join(known)}, or leave it out"
        )
    out = pathlib.Path(folder)
    config.data.date = config.data.date or workdir.date_of(out)
    subject = open_subject(model, config, step=step)
    if subject.tokenizer.prints_date:
        config.data.date = str(subject.tokenizer.day)
    if subject.mesh.devices is not None:
        print(subject.mesh.describe(), flush=True)
    tasks = make_tasks(config, subject)
    header = make_header(config, subject, tasks)
    header["benchmarks"] = check_workdir(out, header) | header["benchmarks"]
    notes = models.check_weights(subject.section.path, subject.config)
    print(f"workdir {out}", f"model {subject.name}: {subject.path}", *notes,
          *data.prompt_notes("student", subject.tokenizer), sep="\n", flush=True)  # fmt: skip
    for task in tasks:
        skipped = sum(task.skipped.values())
        print(f"{task.benchmark.title}: {len(task.problems)} problems x {task.samples} answers from "
              f"{task.file}" + f"; {task.columns}" * bool(task.columns)
              + f"; {skipped} rows left out" * bool(skipped), flush=True)  # fmt: skip
    _write(out / "evaluation.json", json.dumps(header, indent=2, ensure_ascii=False))
    _write(out / "config.json", configuration.to_json(config))
    _write(out / "run.json", json.dumps(workdir.provenance(command), indent=2))
    return _Evaluation(config, subject, out, header).run(tasks)


def make_header(config: ConfigDict, subject: Subject, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return what is needed to repeat the evaluation, except versions and devices (see run.json)."""
    section = config.eval
    flat = configuration.flatten(json.loads(configuration.to_json(config)))
    return {
        "model": {
            "path": subject.path, "step": subject.step, "sha256": subject.sha256(),
            "source": subject.section.path, "stop_ids": list(subject.stop_ids),
        },
        "protocol": protocols.name_of(
            temperature=section.temperature, top_p=section.top_p, samples=section.samples,
            max_response_tokens=section.max_response_tokens, fallbacks=tuple(section.fallbacks),
            prompt_template=config.data.prompt_template, system_prompt=config.data.system_prompt,
        ),
        "fields": {name: value for name, value in flat.items() if name.startswith(_TOUCHES)}
        | ({"data.date": config.data.date} if config.data.date else {}),
        "benchmarks": {
            task.benchmark.name: {
                "file": task.file, "problems": len(task.problems), "samples": task.samples,
                "rule": task.benchmark.rule, "left_out": task.skipped, "sha256": task.sha256,
                "slots": task.slots(config, subject), "first_prompt": task.texts[0],
            }
            for task in tasks
        },
    }  # fmt: skip


def check_workdir(out: pathlib.Path, header: dict[str, Any]) -> dict[str, Any]:
    """Return the benchmarks in the header of the workdir's evaluation, {} for a new workdir.

    Raises WorkdirError if the workdir cannot be written, holds something else than an evaluation, or
    holds an evaluation of another model or with other settings.
    """
    if above := workdir.obstacle(out):
        raise WorkdirError(
            f"workdir {str(out)!r} cannot be written ({above} is read-only or not a folder); set "
            "another one with --workdir"
        )
    file = out / "evaluation.json"
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise WorkdirError(
                f"workdir {str(out)!r} is not empty and has no evaluation.json, so it is not an "
                "evaluation; set a new folder with --workdir"
            )
        return {}
    try:
        old_header = json.loads(file.read_text(encoding="utf-8"))
        old = _identity(old_header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); set a new --workdir") from None
    new = _identity(header)
    # A later command may name other benchmarks: compare only those that both have, and keep all answers.
    shared = {k for k in old | new if not k.startswith("benchmark ") or (k in old and k in new)}
    changed = workdir.differences(*({k: d[k] for k in shared if k in d} for d in (old, new)))
    if changed:
        raise WorkdirError(
            f"workdir {str(out)!r} belongs to another evaluation ({'; '.join(changed)}); set a new "
            "--workdir, or the old values to resume it"
        )
    return old_header["benchmarks"]


def _identity(header: dict[str, Any]) -> dict[str, Any]:
    """Return what answers depend on, as a flat dict. Paths are not part of it, because files may move."""
    # A header of an older version lacks newer fields: they had their defaults, but grades may differ.
    flat = configuration.flatten(
        json.loads(configuration.to_json(configuration.EVALUATION.default()))
    )
    defaults = {k: v for k, v in flat.items() if k.startswith(_TOUCHES)}
    defaults |= {"data.date": "", "grading.grader": "that of an older version"}
    fields = {k: v for k, v in (defaults | header["fields"]).items() if k != "student.path"}
    prompts = {f"benchmark {k}": v["sha256"][:12] for k, v in header["benchmarks"].items()}
    model = {"the model's sha256": header["model"]["sha256"][:12], "step": header["model"]["step"]}
    return json.loads(json.dumps(fields | prompts | model))


class _Answers(JsonlFile):
    """Answers of one benchmark, one line each, in a fixed order so that a killed evaluation can resume.

    Attributes:
      rows: answers so far.
      dropped: number of lines cut off, from the first broken one on.
    """

    def __init__(self, path: pathlib.Path, task: Task, *, skip: bool):
        """Open NAME.jsonl and read its answers.

        The first line that is not the expected answer is cut off with all lines after it, so that these
        answers are sampled again, if `skip` is true or if it is the last line. Otherwise it raises
        WorkdirError.
        """
        with atomic.reported(path, "set another --workdir"):
            super().__init__(path, elsewhere="--workdir")
        self.rows: list[dict[str, Any]] = []
        self.dropped = end = 0
        for number, (line_end, row) in enumerate(self.lines(), start=1):
            if not self.dropped and _is_answer(row, len(self.rows), task):
                self.rows.append(row)
                end = line_end
                continue
            self.dropped += 1
            # After a power failure the last line may consist of zeros.
            last = line_end == path.stat().st_size
            if self.dropped == 1 and not skip and not last:
                self.close()
                raise WorkdirError(
                    f"{path}, line {number}: not the answer expected there; set "
                    "--config.data.bad_rows=skip to sample it and all lines after it again, or set a new "
                    "--workdir"
                )
        self.cut(end)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append answers; they are on the disk when this returns."""
        advice = "correct this and run the same command again; finished answers are kept"
        with atomic.reported(self.path, advice):
            self.append(rows)
        self.rows += rows


def _is_answer(row: Any, index: int, task: Task) -> bool:
    """Return whether a line holds the answer with this index."""
    try:
        place = row["problem"], row["sample"]
        complete = isinstance(row["answer"], str) and isinstance(row["grade"], str)
    except (KeyError, TypeError):
        return False
    return complete and index < task.total and place == divmod(index, task.samples)


class _Evaluation:
    """State of a running evaluation. Weights are read only when an answer has to be sampled."""

    def __init__(self, config: ConfigDict, subject: Subject, out: pathlib.Path, header: dict):
        self.config, self.subject, self.out, self.header = config, subject, out, header
        self.params: models.Params | None = None
        self.tokens, self.seconds = 0, 0.0  # of the answers sampled by this process

    def run(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Evaluate all benchmarks, write results.json, .txt and .md, and return the content of the first."""
        summaries = {}
        with make_grader(self.config.grading) as grader:
            for task in tasks:
                rows = self.answers(task, grader)
                summaries[task.benchmark.name] = results.summary(rows, task.samples)
        backbone = self.config.eval.backbone or results.backbone_of(
            f"{self.subject.path} {self.subject.section.path}"
        )
        table = results.comparison(self.subject.name, summaries, backbone)
        report = self.header | {
            "results": summaries, "table": table,
            "sampled_here": {  # by this process only, without answers from before a resume
                "tokens": self.tokens, "seconds": round(self.seconds, 3),
                "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 1),
            },
        }  # fmt: skip
        text = f"{results.as_text(table)}\n\n{results.details(summaries)}\n"
        _write(self.out / "results.json", json.dumps(report, indent=2, ensure_ascii=False))
        _write(self.out / "results.txt", text)
        parts = results.as_text(table, markdown=True), results.details(summaries, markdown=True)
        _write(self.out / "results.md", "\n\n".join(parts) + "\n")
        print(f"\n{text}\nwritten to {self.out}", flush=True)
        return report

    def answers(self, task: Task, grader: Grader) -> list[dict[str, Any]]:
        """Return the answers of one benchmark; sample and append those that its file does not have yet."""
        path, title = self.out / "eval" / f"{task.benchmark.name}.jsonl", task.benchmark.title
        size, skip = self.config.eval.batch, self.config.data.bad_rows == "skip"
        with _Answers(path, task, skip=skip) as file:
            progress = console.Progress(task.total, len(file.rows))
            if file.dropped:
                progress.say(
                    f"{path}: line {len(file.rows) + 1} is broken; its answer and those after it are "
                    f"sampled again ({file.dropped} lines)"
                )
            if file.rows:
                progress.say(f"{title}: resuming with {len(file.rows)} of {task.total} answers")
            began, first, line = time.perf_counter(), len(file.rows), title
            while (count := len(file.rows)) < task.total:
                start = count // size * size
                numbers = range(start, min(start + size, task.total))

                def show(sampled: int, *, line: str = line, size: int = len(numbers)) -> None:
                    progress.show(f"{line}  (+ {sampled:,} of {size:,} sampled)", always=False)

                show(0)
                rows = self.batch(task, numbers, grader, on_finished=show)
                file.add(rows[count - start :])
                line = _progress(task, file.rows, first, time.perf_counter() - began)
                progress.show(line, always=False)
            if len(file.rows) > first:
                progress.say(line)
            return file.rows

    def batch(
        self,
        task: Task,
        numbers: range,
        grader: Grader,
        *,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Sample and grade the answers with these numbers; number i belongs to problem i // samples.

        `on_finished` is called with the number of answers sampled so far.
        """
        section, subject = self.config.eval, self.subject
        if self.params is None:
            self.params = subject.load()
        pairs = [divmod(i, task.samples) for i in numbers]  # (problem, sample)
        began = time.perf_counter()
        sampled = sample_responses(
            models.Model(subject.config, self.params),
            [task.prompts[problem] for problem, _ in pairs],
            SamplingParams(
                budget(self.config),
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
                stop_ids=subject.stop_ids,
                vocabulary=subject.vocabulary,
            ),
            keys=answer_keys(self.config.seed, task.texts, pairs),
            batching=Batching(
                slots=task.slots(self.config, subject),
                max_prompt_tokens=task.width,
                mesh=subject.mesh,
                tile=hardware.tile(gpu=jax.default_backend() == "gpu"),
            ),
            on_finished=on_finished,
        )
        self.seconds += time.perf_counter() - began
        self.tokens += int(sampled.response_length_B.sum())
        golds = [task.problems[problem].answer for problem, _ in pairs]
        fallbacks = tuple(section.fallbacks)
        responses = read_responses(
            sampled.responses(), golds, subject.tokenizer,
            grader=grader, repetition=metrics.make_repetition_rule(self.config.metrics),
            fallbacks=fallbacks, rule=task.benchmark.rule,
        )  # fmt: skip
        rows = []
        for i, (problem, sample) in enumerate(pairs):
            answer, grade = find(responses.texts[i], fallbacks), responses.grades[i]
            assert grade is not None, "every problem of a benchmark has a gold answer"
            rows.append({
                "problem": problem, "sample": sample, "id": task.problems[problem].id,
                "prompt": task.texts[problem],
                "answer": data.response_text(
                    subject.tokenizer, sampled.prompt(i), sampled.response(i)
                ),
                "gold": golds[i],
                "extracted": letters(answer.text)[:200] if answer else None,
                "grade": grade.value, "outcome": Outcome(int(sampled.outcome_B[i])).name.lower(),
                "length": int(sampled.response_length_B[i]),
                "repetitive": bool(responses.flagged_B[i]),
            })  # fmt: skip
        return rows


def _progress(task: Task, rows: Sequence[dict], first: int, elapsed: float) -> str:
    """Return `AIME24  256/960  correct 12.1%  truncated 3%  1,234 tok/s  0:03:20 left`.

    Shares are those of all answers so far; tokens/s and the time left are those of this process, whose
    first answer is `rows[first]`.
    """
    done = len(rows)
    share = {
        name: sum(row[key] == value for row in rows) / done
        for name, key, value in (
            ("correct", "grade", "CORRECT"),
            ("truncated", "outcome", "budget"),
        )
    }
    rate = sum(row["length"] for row in rows[first:]) / max(elapsed, 1e-9)
    left = elapsed / max(done - first, 1) * (task.total - done)
    clock = datetime.timedelta(seconds=int(left or elapsed))
    return (
        f"{task.benchmark.title}  {done:,}/{task.total:,}  correct {share['correct']:.1%}  "
        f"truncated {share['truncated']:.0%}  {rate:,.0f} tok/s  "
        + (f"{clock} left" if left else f"in {clock}")
    )


def _write(path: pathlib.Path, text: str) -> None:
    with atomic.reported(path, "set another --workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text if text.endswith("\n") else text + "\n")
