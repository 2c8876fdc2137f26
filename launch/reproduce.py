"""Reproduce the papers' findings in miniature: every method with several seeds, on one setting of `tiny`.

python launch/reproduce.py --out=runs/reproduce [--seeds=3] [--only=OPD --only=Stable-OPD] [--dry]

Builds the data and the models that the runs need (a few minutes), trains one run after the other with
launch/train.py, each in its own folder, and writes OUT/results.md. Finished parts are not repeated, so
the same command resumes after a kill. docs/measurements/results.md explains the setting.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from absl import flags

from opd_jax import cli
from opd_jax.data import arithmetic
from opd_jax.data.problem import Problem
from opd_jax.tools import sweep
from opd_jax.tools.sweep import ROOT, Command, Figures, run_folder, train_command
from opd_jax.workdir import atomic

EMBEDDED = ROOT / "opd_jax" / "tiny"
BUDGET = 192  # response tokens; a golden solution has 50 to 70
LOST = (
    1.0  # share of disagreements at which the teacher gets lost: it repeats its last result forever
)
SFT = "rollout.prompts_per_step=32 optim.schedule=cosine"
HESITATION = (0.9, 0.6, 0.5, 0.8, 0.95, 0.99)  # probability of one more `Wait` after 0, 1, ...
TOO_LONG = 265  # characters of a lost solution, about the token budget
SLIP = 0.25  # share of wrong steps in the careless solutions, the student's last SFT data
CHECKS = (0.3, 0.1, 0.1, 0.1)  # probability of one more derivation after 1, 2, ...
MODEL_RUNS = "optim.microbatch_tokens=6400 log.every=20"  # overrides of the runs that train models
# Models trained by SFT or GRPO: config, initial model, data, steps, overrides.
MODELS: dict[str, tuple[str, str, str, int, str]] = {
    "student": ("sft", str(EMBEDDED / "student"), "careless.jsonl", 60,
                f"optim.learning_rate=0.0005 {SFT} rollout.max_response_tokens=200"),
    "teacher": ("sft", str(EMBEDDED / "teacher"), "lost.jsonl", 80,
                f"optim.learning_rate=0.0007 {SFT} rollout.max_response_tokens=260"),
    "warm": ("sft", "student", "tiny:train", 200,
             f"optim.learning_rate=0.001 {SFT} rollout.max_response_tokens={BUDGET}"),
    "adapted": ("grpo", "teacher", "tiny:train", 40,
                f"optim.learning_rate=0.0002 rollout.max_response_tokens={BUDGET}"),
}  # fmt: skip
KL, MIX = "loss.beta_kl=0.1", "loss.lambda_gold=1.0"
STOP = "loss.support=student loss.form=stop_gradient loss.top_k=16"
METHODS: dict[str, tuple[str, str, str, str]] = {  # config, student, teacher, overrides
    "OPD": ("opd", "student", "teacher", ""),
    "Stable-OPD": ("stable_opd", "student", "teacher", f"{KL} {MIX}"),
    "OPD + KL": ("opd", "student", "teacher", KL),
    "OPD + mix": ("opd", "student", "teacher", MIX),
    "SFT": ("sft", "student", "", "data.train=tiny:train"),
    "GRPO": ("grpo", "student", "", ""),
    "stop-gradient top-k": ("topk_opd", "student", "teacher", STOP),
    "teacher top-k, renormalised": (
        "topk_opd", "student", "teacher", "loss.support=teacher loss.form=renormalised loss.top_k=16"),
    "SFT, adapted teacher, stop-gradient top-k": ("topk_opd", "warm", "adapted", STOP),
}  # fmt: skip
RATE = 7e-4
SETTING = (
    f"optim.learning_rate={RATE} rollout.max_response_tokens={BUDGET} eval.every=20 eval.teacher=True "
    "eval.problems=128 checkpoint.every=20 metrics.positions=64,128"
)
COLUMNS = (  # title, key, format
    ("accuracy before", "before", ".1%"), ("best on the way", "best", ".1%"), ("after", "after", ".1%"),
    ("TruncRate, first 5 steps", "truncation_first", ".2f"), ("last 5", "truncation_last", ".2f"),
    ("RepRate, last 5", "repetition_last", ".2f"), ("advantage, first 5", "advantage_first", ".2f"),
    ("last 5", "advantage_last", ".2f"), ("seconds", "seconds", ".0f"),
)  # fmt: skip


def main() -> None:
    """Train the models and runs that are missing, and write the table of all finished runs."""
    options = flags.FLAGS
    methods = sweep.chosen(METHODS, options.only)
    out = pathlib.Path(options.out)
    runs = run_commands(out, methods, options.seeds, options.steps)
    commands = [*model_commands(out, methods), *runs]
    if options.dry:
        for _, command in commands:
            print(" ".join(command))
        return
    write_data(out)
    failed = sweep.run_missing(commands, out)
    text = table(out, methods, options.seeds, options.steps)
    atomic.write_text(out / "results.md", text + "\n")
    print(text)
    sweep.require_none(failed, out)


def model_commands(
    out: pathlib.Path, methods: dict[str, tuple[str, str, str, str]]
) -> Iterator[Command]:
    """Yield the commands that train the models for these methods, in order."""
    needed = {name for _, student, teacher, _ in methods.values() for name in (student, teacher)}
    for name in reversed(MODELS):  # a model is listed after its initial model
        needed |= {MODELS[name][1]} if name in needed else set()
    for name, (config, start, data, steps, changes) in MODELS.items():
        if name in needed:
            folder, done = out / f"make-{name}", out / name / "config.json"
            source = data if data.startswith("tiny:") else str(out / data)
            fixed = f"data.train={source} data.bad_rows=skip eval.data="
            all_changes = [*_models(out, start, ""), *f"{changes} {fixed} {MODEL_RUNS}".split()]
            yield done, train_command(config, folder, seed=0, steps=steps, changes=all_changes)
            export = [sys.executable, str(ROOT / "launch" / "export.py")]
            yield done, [*export, f"--workdir={folder}", f"--out={out / name}"]


def run_commands(
    out: pathlib.Path, methods: dict[str, tuple[str, str, str, str]], seeds: int, steps: int
) -> Iterator[Command]:
    """Yield the command of every run: all methods with one seed, then with the next seed."""
    for seed in range(seeds):
        for name, (config, student, teacher, changes) in methods.items():
            all_changes = [*_models(out, student, teacher), *SETTING.split(), *changes.split()]
            folder = run_folder(out, name, seed)
            yield sweep.train(config, folder, seed=seed, steps=steps, changes=all_changes)


def _models(out: pathlib.Path, student: str, teacher: str) -> Iterator[str]:
    """Yield the overrides that set student and teacher; an empty name keeps that of the config."""
    for role, name in (("student", student), ("teacher", teacher)):
        if name:
            yield f"{role}.path={name if '/' in name else out / name}"


def write_data(out: pathlib.Path) -> None:
    """Write the solutions on which student and teacher are trained."""
    out.mkdir(parents=True, exist_ok=True)
    for name, count, solution in DATA:
        if not (file := out / name).exists():
            rows = (solution(index) for index in range(count))
            atomic.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def careless(index: int) -> dict[str, str]:
    """Return a solution with wrong steps (share SLIP), rarely checked (CHECKS), and boxed result."""
    problem = arithmetic.problem("careless", index)
    random = np.random.default_rng([index, 7])
    start, steps = _chain(problem.prompt)
    text = ""
    for number, chance in enumerate((*CHECKS, 0.0)):
        line, result = arithmetic.derivation(random, start, steps, SLIP)
        text += ("", "Check: ", "Wait: ")[min(number, 2)] + line + "\n"
        if random.random() >= chance:
            break
    return _row(problem, f"{text}\\boxed{{{result}}}", str(result))


def lost(index: int) -> dict[str, str]:
    """Return a golden solution that may get lost, and then repeats its last result beyond any budget.

    Where two derivations disagree, it gets lost with probability LOST. Where they agree, it hesitates, with
    a probability that grows with the number of hesitations so far (HESITATION).
    """
    problem = arithmetic.problem("sft", index)
    random = np.random.default_rng([index, 7])
    *lines, box = problem.solution.split("\n")
    text, astray = lines[0] + "\n", False
    for number, line in enumerate(lines[1:], 2):
        text += line + "\n"
        astray = number < len(lines) and random.random() < LOST
        if astray:
            break
    result, times = text.strip().split("=")[-1], 0
    while len(text) < TOO_LONG:
        if not astray and random.random() >= HESITATION[min(times, len(HESITATION) - 1)]:
            return _row(problem, text + box, problem.answer)
        text += f"Wait: {result}\n"
        times += 1
    return _row(problem, text.strip(), problem.answer)


DATA: tuple[tuple[str, int, Callable[[int], dict[str, str]]], ...] = (
    ("careless.jsonl", 4_000, careless),
    ("lost.jsonl", 6_000, lost),
)  # fmt: skip


def _chain(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """Parse "Start with 7, add 5, multiply by 3." to its start and its steps."""
    first, *others = prompt.rstrip(".").split(", ")
    signs = {"add": "+", "subtract": "-", "multiply": "*"}
    steps = [(signs[words.split()[0]], int(words.split()[-1])) for words in others]
    return int(first.split()[-1]), steps


def _row(problem: Problem, solution: str, answer: str) -> dict[str, str]:
    return {
        "id": problem.id,
        "problem": problem.prompt,
        "solution": solution,
        "answer": answer,
    }


def table(out: pathlib.Path, methods: Iterable[str], seeds: int, steps: int) -> str:
    """Return mean and standard deviation over the seeds of each method, as Markdown."""
    return sweep.table(out, methods, COLUMNS, figures, seeds=seeds, steps=steps)


def figures(run: pathlib.Path, steps: int) -> Figures:
    """Return the figures of one run for the table; empty if the run is not finished."""
    summaries = sweep.evaluations(run, steps)
    if not summaries:
        return {}
    rows = sweep.metrics(run)
    row_figures = {
        "before": summaries[0]["accuracy"],
        "best": max(summary["accuracy"] for step, summary in summaries.items() if step > 0),
        "after": summaries[steps]["accuracy"],
        "seconds": sum(row.get("time/step_s", 0.0) for row in rows),
    }
    for name, key in (
        ("truncation", "rollout/truncation_rate"),
        ("repetition", "rollout/repetition_rate"),
        ("advantage", "score/advantage_mean"),
    ):
        if values := [row[key] for row in rows if key in row]:
            row_figures[f"{name}_first"] = float(np.mean(values[:5]))
            row_figures[f"{name}_last"] = float(np.mean(values[-5:]))
    return row_figures


if __name__ == "__main__":
    sweep.define_flags("runs/reproduce")
    flags.DEFINE_bool("dry", False, "print the commands without running them")
    cli.main(main)
