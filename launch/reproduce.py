"""The papers' findings in miniature: every method, several seeds each, on one setting of `tiny`.

python launch/reproduce.py --out=runs/reproduce [--seeds=3] [--steps=60] [--only=OPD,Stable-OPD] [--dry]

Makes the data and the models that the runs need (a few minutes), then trains one run after the other with
launch/train.py, each in a folder of its own, and writes OUT/results.md. What is done is not done
again: the same command goes on after a kill. The setting and its reasons: docs/results.md.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags

from opd_jax import cli
from opd_jax.data import tiny
from opd_jax.data.problem import Problem
from opd_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
EMBEDDED = ROOT / "opd_jax" / "tiny"
BUDGET = 192  # response tokens; a golden solution has 50 to 70
LOST = 1.0  # share of disagreements at which the teacher gets lost: it repeats its last result for ever
SFT = "rollout.prompts_per_step=32 optim.schedule=cosine"
HESITATION = (0.9, 0.6, 0.5, 0.8, 0.95, 0.99)  # chance of one more `Wait` after 0, 1, ...
TOO_LONG = 265  # characters of a lost solution: the budget, more or less
SLIP = 0.25  # share of wrong steps in what the student last learned
CHECKS = (0.3, 0.1, 0.1, 0.1)  # chance of one more derivation after 1, 2, ...
# Models that SFT or GRPO makes: config, what it starts from, data, steps, overrides.
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


def define_flags() -> None:
    """Of the command; not where this file is imported."""
    flags.DEFINE_string("out", "runs/reproduce", "folder of data, models and runs")
    flags.DEFINE_integer("seeds", 3, "runs of each method", lower_bound=1)
    flags.DEFINE_integer("steps", 60, "steps of each run", lower_bound=1)
    flags.DEFINE_list("only", [], "methods to run; default all")
    flags.DEFINE_bool("dry", False, "print the commands, run none")


def main() -> None:
    """Make what is missing, run what is missing, write the table of what is there."""
    given = flags.FLAGS
    chosen = {name: METHODS[name] for name in given.only or METHODS if name in METHODS}
    if unknown := set(given.only) - METHODS.keys():
        raise ConfigError(
            f"--only={sorted(unknown)[0]!r} is not a method; known: {'; '.join(METHODS)}"
        )
    out = pathlib.Path(given.out)
    plan = [*model_commands(out, chosen), *run_commands(out, chosen, given.seeds, given.steps)]
    if given.dry:
        for _, command in plan:
            print(" ".join(command))
        return
    write_data(out)
    for done, command in plan:
        if not done.exists():
            print(done.relative_to(out), flush=True)
            _run(command, out / "log.txt")
    text = table(out, chosen, given.seeds, given.steps)
    (out / "results.md").write_text(text + "\n")
    print(text)


def model_commands(
    out: pathlib.Path, chosen: dict[str, tuple[str, str, str, str]]
) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """(file that shows it is done, command) of the models that the chosen methods need, in order."""
    needed = {name for _, student, teacher, _ in chosen.values() for name in (student, teacher)}
    for name in reversed(MODELS):  # a model comes after what it starts from
        needed |= {MODELS[name][1]} if name in needed else set()
    for name, (config, start, data, steps, changes) in MODELS.items():
        if name in needed:
            folder = out / f"make-{name}"
            source = data if data.startswith("tiny:") else str(out / data)
            yield out / name / "config.json", _train(
                folder, config, _model(out, start), "", 0, steps,
                f"{changes} data.train={source} data.bad_rows=skip eval.data= "
                "optim.microbatch_tokens=6400 log.every=20",
            )  # fmt: skip
            export = [sys.executable, str(ROOT / "launch" / "export.py")]
            yield (
                out / name / "config.json",
                [*export, f"--workdir={folder}", f"--out={out / name}"],
            )


def run_commands(
    out: pathlib.Path, chosen: dict[str, tuple[str, str, str, str]], seeds: int, steps: int
) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """(file that shows it is done, command) of every run: all methods of a seed, then the next seed."""
    for seed in range(seeds):
        for name, (config, student, teacher, changes) in chosen.items():
            folder = out / f"{slug(name)}-{seed}"
            yield folder / "eval" / str(steps) / "tiny.json", _train(
                folder, config, _model(out, student), _model(out, teacher), seed, steps,
                f"{SETTING} {changes}",
            )  # fmt: skip


def _model(out: pathlib.Path, name: str) -> str:
    return name if "/" in name or not name else str(out / name)


def _train(
    folder: pathlib.Path,
    config: str,
    student: str,
    teacher: str,
    seed: int,
    steps: int,
    changes: str,
) -> list[str]:
    """One training command; an empty teacher leaves the config's own."""
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--config={ROOT}/configs/{config}.py:tiny",
        f"--workdir={folder}", f"--config.student.path={student}", f"--config.seed={seed}",
        f"--config.steps={steps}", *([f"--config.teacher.path={teacher}"] if teacher else []),
        *(f"--config.{change}" for change in changes.split()),
    ]  # fmt: skip


def _run(command: list[str], log: pathlib.Path) -> None:
    with log.open("a") as file:
        print(*command, file=file, flush=True)
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            print(f"  failed: see {log}", flush=True)


def write_data(out: pathlib.Path) -> None:
    """The solutions that student and teacher learn from."""
    out.mkdir(parents=True, exist_ok=True)
    for name, count, solution in DATA:
        if not (file := out / name).exists():
            rows = (solution(index) for index in range(count))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def careless(index: int) -> dict[str, str]:
    """A derivation in which a quarter of the steps is wrong, rarely checked (CHECKS), and its result."""
    problem = tiny.problem("careless", index)
    random = np.random.default_rng([index, 7])
    start, steps = _chain(problem.prompt)
    text = ""
    for number, chance in enumerate((*CHECKS, 0.0)):
        line, result = tiny.derivation(random, start, steps, SLIP)
        text += ("", "Check: ", "Wait: ")[min(number, 2)] + line + "\n"
        if random.random() >= chance:
            break
    return _row(problem, f"{text}\\boxed{{{result}}}", str(result))


def lost(index: int) -> dict[str, str]:
    """A golden solution that may get lost: then it repeats its last result beyond any budget.

    Where two derivations disagree it gets lost with chance LOST; where they agree it hesitates:
    the more often it has, the likelier it does again (HESITATION).
    """
    problem = tiny.problem("sft", index)
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
    """Start and steps of "Start with 7, add 5, multiply by 3."."""
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


def table(
    out: pathlib.Path, chosen: dict[str, tuple[str, str, str, str]], seeds: int, steps: int
) -> str:
    """Mean and standard deviation over the seeds of each method, as Markdown."""
    lines = [
        f"| method | seeds | {' | '.join(title for title, _, _ in COLUMNS)} |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for name in chosen:
        found = [figures(out / f"{slug(name)}-{seed}", steps) for seed in range(seeds)]
        found = [one for one in found if one]
        cells = [
            spread([one[key] for one in found if key in one], form) for _, key, form in COLUMNS
        ]
        lines.append(f"| {name} | {len(found) or 'not run'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(run: pathlib.Path, steps: int) -> dict[str, float]:
    """What the table shows of one run; empty where it did not end."""
    summaries = {int(file.parent.name): file for file in run.glob("eval/[0-9]*/tiny.json")}
    if not {0, steps} <= summaries.keys():
        return {}
    accuracy = {at: json.loads(file.read_text())["accuracy"] for at, file in summaries.items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "before": accuracy[0],
        "best": max(value for at, value in accuracy.items() if at > 0),
        "after": accuracy[steps],
        "seconds": sum(row.get("time/step_s", 0.0) for row in rows),
    }
    for name, key in (
        ("truncation", "rollout/truncation_rate"),
        ("repetition", "rollout/repetition_rate"),
        ("advantage", "score/advantage_mean"),
    ):
        if values := [row[key] for row in rows if key in row]:
            found[f"{name}_first"] = float(np.mean(values[:5]))
            found[f"{name}_last"] = float(np.mean(values[-5:]))
    return found


def spread(values: list[float], form: str) -> str:
    """`mean ± standard deviation` of several, the value of one, `-` of none."""
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    return f"{mean} ± {format(float(np.std(values, ddof=1)), form)}" if len(values) > 1 else mean


def slug(name: str) -> str:
    """A method's name as a folder's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


if __name__ == "__main__":
    define_flags()
    cli.main(main)
