"""launch/evaluate.py: a model on several benchmarks, every answer kept, and the table.

Each answer is drawn with a key of its own, from (seed, prompt, sample), in batches whose members are
always the same. So the file of a run that was killed and went on is the file of one that was not, byte
for byte; slots, batches and the order of the problems change no answer beyond rounding.
"""

import datetime
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import data, metrics, models, workdir
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

# Fields that answers, or what is counted in them, depend on.
_TOUCHES = ("seed", "student.", "data.prompt_template", "data.system_prompt", "data.columns.",
            "eval.samples", "eval.temperature", "eval.top_", "eval.problems", "eval.max_response_tokens",
            "eval.fallbacks", "grading.grader", "eval.batch", "eval.any_size",
            "metrics.repetition_")  # fmt: skip


def run(
    config: ConfigDict, model: str, folder: str, *, step: int | None = None, command: list[str]
) -> dict[str, Any]:
    """Evaluate, or go on with it, in the workdir `folder`; returns what results.json holds.

    Raises an OpdError for whatever the user can mend; what is refused is refused before weights are
    read.
    """
    validate_evaluation(config)
    config = config.copy_and_resolve_references()
    config.eval.max_response_tokens = budget(config)
    known = sorted({row["backbone"] for row in results.baselines()})
    if config.eval.backbone and config.eval.backbone not in known:
        raise ConfigError(
            f"eval.backbone={config.eval.backbone!r}, wanted one of {', '.join(known)}; correct it, or "
            "leave it out"
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
    unread = models.check_weights(subject.section.path, subject.config)
    print(f"workdir {out}", f"model {subject.name}: {subject.path}", *unread,
          *data.prompt_notes("student", subject.tokenizer), sep="\n", flush=True)  # fmt: skip
    for task in tasks:
        left = sum(task.skipped.values())
        print(f"{task.benchmark.title}: {len(task.problems)} problems x {task.samples} answers from "
              f"{task.file}" + f"; {task.columns}" * bool(task.columns)
              + f"; {left} rows left out" * bool(left), flush=True)  # fmt: skip
    _write(out / "evaluation.json", json.dumps(header, indent=2, ensure_ascii=False))
    _write(out / "config.json", configuration.to_json(config))
    _write(out / "run.json", json.dumps(workdir.provenance(command), indent=2))
    return _Evaluation(config, subject, out, header).all(tasks)


def make_header(config: ConfigDict, subject: Subject, tasks: Sequence[Task]) -> dict[str, Any]:
    """What, beside versions and devices (run.json), is needed to repeat the evaluation."""
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
    """Refuse a workdir that cannot be written or holds something else; the benchmarks it has so far.

    Raises WorkdirError.
    """
    if above := workdir.obstacle(out):
        raise WorkdirError(
            f"workdir {str(out)!r} cannot be written ({above} is read-only or not a folder); give "
            "another one with --workdir"
        )
    file = out / "evaluation.json"
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise WorkdirError(
                f"workdir {str(out)!r} is not empty and holds no evaluation.json, so it is not an "
                "evaluation; give a new folder with --workdir"
            )
        return {}
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        old = _identity(there)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); give a new --workdir") from None
    new = _identity(header)
    # Benchmarks may come and go: what is there of the others stays.
    shared = {k for k in old | new if not k.startswith("benchmark ") or (k in old and k in new)}
    changed = workdir.differences(*({k: d[k] for k in shared if k in d} for d in (old, new)))
    if changed:
        raise WorkdirError(
            f"workdir {str(out)!r} belongs to another evaluation ({'; '.join(changed)}); give a new "
            "--workdir, or the old values to go on with it"
        )
    return there["benchmarks"]


def _identity(header: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on, flat. Paths are not in it: the same files may lie elsewhere."""
    # A field that came later had no other value than its default then; grades may be others.
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
    """The answers of one benchmark, a line each in a fixed order, so that a killed run goes on.

    Attributes:
      rows: the answers so far. dropped: broken lines that were cut off with all after them (`skip`).
    """

    def __init__(self, path: pathlib.Path, task: Task, *, skip: bool):
        """Open NAME.jsonl. Any line that is not the answer that belongs there raises WorkdirError, or
        is cut off with all after it (`skip`): they are made again. So is a last line that is broken.
        """
        with atomic.reported(path, "give another --workdir"):
            super().__init__(path, elsewhere="--workdir")
        self.rows: list[dict[str, Any]] = []
        self.dropped = end = 0
        for number, (line_end, row) in enumerate(self.lines(), start=1):
            if not self.dropped and _is_answer(row, len(self.rows), task):
                self.rows.append(row)
                end = line_end
                continue
            self.dropped += 1
            # A machine that loses power can leave zeros where a last line was being written.
            last = line_end == path.stat().st_size
            if self.dropped == 1 and not skip and not last:
                self.close()
                raise WorkdirError(
                    f"{path}, line {number}: not the answer that belongs there; remove it and all after "
                    "it, give a new --workdir, or let it be done: --config.data.bad_rows=skip"
                )
        self.cut(end)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append answers; they are on the disk when this returns."""
        advice = "mend that and give the same command again: what is done is kept"
        with atomic.reported(self.path, advice):
            self.append(rows)
        self.rows += rows


def _is_answer(row: Any, index: int, task: Task) -> bool:
    """Whether a line holds the answer with this index."""
    try:
        place = row["problem"], row["sample"]
        complete = isinstance(row["answer"], str) and isinstance(row["grade"], str)
    except (KeyError, TypeError):
        return False
    return complete and index < task.total and place == divmod(index, task.samples)


class _Evaluation:
    """The moving parts: the weights (read when the first answer is missing) and the graders."""

    def __init__(self, config: ConfigDict, subject: Subject, out: pathlib.Path, header: dict):
        self.config, self.subject, self.out, self.header = config, subject, out, header
        self.params: models.Params | None = None
        self.tokens, self.seconds = 0, 0.0  # sampled by this process

    def all(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Every benchmark, then the files that say how it went."""
        found = {}
        with make_grader(self.config.grading) as grader:
            for task in tasks:
                rows = self.one(task, grader)
                found[task.benchmark.name] = results.summary(rows, task.samples)
        backbone = self.config.eval.backbone or results.backbone_of(
            f"{self.subject.path} {self.subject.section.path}"
        )
        table = results.comparison(self.subject.name, found, backbone)
        report = self.header | {
            "results": found, "table": table,
            "sampled_here": {  # by the process that wrote this; an earlier part of the run not counted
                "tokens": self.tokens, "seconds": round(self.seconds, 3),
                "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 1),
            },
        }  # fmt: skip
        text = f"{results.as_text(table)}\n\n{results.details(found)}\n"
        _write(self.out / "results.json", json.dumps(report, indent=2, ensure_ascii=False))
        _write(self.out / "results.txt", text)
        marked = results.as_text(table, markdown=True), results.details(found, markdown=True)
        _write(self.out / "results.md", "\n\n".join(marked) + "\n")
        print(f"\n{text}\nwritten to {self.out}", flush=True)
        return report

    def one(self, task: Task, grader: Grader) -> list[dict[str, Any]]:
        """The answers of one benchmark: those that are there, and the missing ones."""
        path, title = self.out / "eval" / f"{task.benchmark.name}.jsonl", task.benchmark.title
        size, skip = self.config.eval.batch, self.config.data.bad_rows == "skip"
        with _Answers(path, task, skip=skip) as file:
            progress = console.Progress(task.total, len(file.rows))
            if file.dropped:
                progress.say(
                    f"{path}: {file.dropped} lines from the first broken one on are made again"
                )
            if file.rows:
                progress.say(f"{title}: {len(file.rows)} of {task.total} answers are there")
            began, first, line = time.perf_counter(), len(file.rows), title
            while (there := len(file.rows)) < task.total:
                start = there // size * size
                answers = range(start, min(start + size, task.total))

                def told(count: int, *, line: str = line, size: int = len(answers)) -> None:
                    progress.show(f"{line}  (+ {count:,} of {size:,} sampled)", always=False)

                told(0)
                rows = self.batch(task, answers, grader, on_finished=told)
                file.add(rows[there - start :])
                line = _progress(task, file.rows, first, time.perf_counter() - began)
                progress.show(line, always=False)
            if len(file.rows) > first:
                progress.say(line)
            return file.rows

    def batch(
        self,
        task: Task,
        answers: range,
        grader: Grader,
        *,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Sample and grade answers by their numbers: number i is of problem i // samples.

        `on_finished` is told how many are sampled so far.
        """
        section, subject = self.config.eval, self.subject
        if self.params is None:
            self.params = subject.load()
        which = [divmod(i, task.samples) for i in answers]
        began = time.perf_counter()
        sampled = sample_responses(
            models.Model(subject.config, self.params),
            [task.prompts[problem] for problem, _ in which],
            SamplingParams(
                budget(self.config),
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
                stop_ids=subject.stop_ids,
                vocabulary=subject.vocabulary,
            ),
            keys=answer_keys(self.config.seed, task.texts, which),
            batching=Batching(
                slots=task.slots(self.config, subject),
                max_prompt_tokens=task.width,
                mesh=subject.mesh,
            ),
            on_finished=on_finished,
        )
        self.seconds += time.perf_counter() - began
        self.tokens += int(sampled.response_length_B.sum())
        golds = [task.problems[problem].answer for problem, _ in which]
        fallbacks = tuple(section.fallbacks)
        read = read_responses(
            sampled.responses(), golds, subject.tokenizer,
            grader=grader, repetition=metrics.make_repetition_rule(self.config.metrics),
            fallbacks=fallbacks, rule=task.benchmark.rule,
        )  # fmt: skip
        rows = []
        for i, (problem, sample) in enumerate(which):
            answer, grade = find(read.texts[i], fallbacks), read.grades[i]
            assert grade is not None, "a benchmark has problems with answers alone"
            rows.append({
                "problem": problem, "sample": sample, "id": task.problems[problem].id,
                "prompt": task.texts[problem],
                "answer": data.response_text(
                    subject.tokenizer, sampled.prompt(i), sampled.response(i)
                ),
                "gold": golds[i],
                "extracted": letters(answer.text)[:200] if answer else None,
                "grade": grade.value, "outcome": Outcome(int(sampled.outcome_B[i])).name.lower(),
                "length": int(sampled.response_length_B[i]), "repetitive": bool(read.flagged_B[i]),
            })  # fmt: skip
        return rows


def _progress(task: Task, rows: Sequence[dict], first: int, elapsed: float) -> str:
    """`AIME24  256/960  correct 12.1%  truncated 3%  1,234 tok/s  0:03:20 left`; rates of this process."""
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
    with atomic.reported(path, "give another --workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text if text.endswith("\n") else text + "\n")
