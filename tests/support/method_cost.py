"""Seconds of a step of each published method beside those of plain OPD, on the same rollouts.

    python -m tests.support.method_cost                                # all of configs/methods.py, `tiny`
    python -m tests.support.method_cost --student=DIR --teacher=DIR    # SmolLM2-135M, its own teacher
    python -m tests.support.method_cost --programs                     # which programs differ from OPD's

A step is everything but the sampling of the rollouts, which no method changes: scoring, grading, rows and
update. Steps of the method and of OPD alternate, and the first of a pair is the other one each time. OPD has
the same prompts, rollouts and teacher; where the method has no teacher, it has the recipe's. The seconds of
one sampling are measured beside it, so that the ratio of complete steps can be given as well. --only=NAME
selects a method, --only=NAME.. also all later ones. With --student a step has 4 rollouts of 64 tokens.

Columns: seconds of OPD's step, of which scoring; the median ratio of the pairs, with the interval in which
95 % of the medians of resampled pairs lie; the same for scoring alone and for all but scoring; the
milliseconds in which rows are built from scores, of OPD and of the method; the ratio of complete steps.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import methods, opd
from opd_jax import aot, data, host_memory
from opd_jax.grading.grader import Grader, make_grader
from opd_jax.models import decoder
from opd_jax.rng import Stream, key_for
from opd_jax.training.make_setup import make_setup
from opd_jax.training.setup import Setup
from opd_jax.training.step import Step, StepState
from opd_jax.training.step_functions import StepFunctions, make_step_functions
from opd_jax.training.weights import load_weights
from opd_jax.types import Rollout, TrainState

WARM = 2  # steps of each before the pairs: they compile


@dataclasses.dataclass(frozen=True)
class Replayed(StepFunctions):
    """Step functions that return a rollout that exists already instead of sampling one."""

    rollout: Rollout | None = None

    def generate(self, *_: Any) -> Rollout:
        """Return the rollout."""
        assert self.rollout is not None
        return self.rollout


class TimedStep(Step):
    """A step that records the seconds in which rows are built."""

    rows_s = 0.0

    def _rollout_rows(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = super()._rollout_rows(*arguments)
        self.rows_s = time.perf_counter() - began
        return result


class Method:
    """One method's step, with a state of its own or one that is lent to it."""

    def __init__(self, setup: Setup, rollout: Rollout, grader: Grader, folder: pathlib.Path):
        functions = make_step_functions(setup.spec)
        fields = {f.name: getattr(functions, f.name) for f in dataclasses.fields(functions)}
        self.functions = Replayed(**fields, rollout=rollout)
        self.setup, self.weights = setup, load_weights(setup, student=False)
        self.step = TimedStep(setup, self.functions, self.weights, grader, folder)

    def run(self, number: int, state: TrainState, batch: data.Batch) -> tuple[TrainState, list]:
        """Take a step; return the state and the seconds of all, of scoring and of the rows."""
        began = time.perf_counter()
        after, row, _ = self.step(number, StepState(state), batch, self.setup.terms.weights)
        jax.block_until_ready(after.train)
        seconds = time.perf_counter() - began
        return after.train, [seconds, row.get("time/score_s", 0.0), self.step.rows_s]


def config_of(name: str, options: argparse.Namespace) -> ConfigDict:
    """The method's config, without anything that happens now and then."""
    config = methods.get_config(f"{name},{options.recipe}")
    if options.student:
        config.student.path = options.student
        if config.teacher.path not in ("", "student"):
            config.teacher.path = options.student
        config.data.train = "tiny:train"
        config.rollout.prompts_per_step, config.rollout.samples_per_prompt = 2, 2
        config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 128, 64
    if options.teacher and config.teacher.path not in ("", "student"):
        config.teacher.path = options.teacher
        config.data.teacher_prompt_template = "same"
    config.optim.updates_per_rollout = 1  # some papers take several; the work is the same
    config.log.gradients, config.eval.data, config.eval.best, config.steps = 0, "", "", 10_000
    return config


def baseline_of(config: ConfigDict, options: argparse.Namespace) -> ConfigDict:
    """Plain OPD with the rollouts, the prompts and the teacher of a method."""
    plain = config_of("opd", options)
    plain.rollout = config.rollout.copy_and_resolve_references()
    if config.teacher.path:
        plain.data = config.data.copy_and_resolve_references()
        plain.teacher = config.teacher.copy_and_resolve_references()
        plain.teacher.follow, plain.teacher.every = "frozen", 10
    plain.data.prompt_template = config.data.prompt_template
    plain.optim.microbatch_tokens = config.optim.microbatch_tokens
    return plain


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the quantiles .025 and .975 of the medians of 2,000 resamplings."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


class Baseline:
    """Plain OPD with a state, and a rollout that it sampled; kept while methods share all of it."""

    def __init__(self, config: ConfigDict, grader: Grader, folder: pathlib.Path):
        setup = make_setup(config)
        self.batch = self.read(setup, config)
        sampler = make_step_functions(setup.spec)
        self.state: TrainState | None = sampler.initial_state(fresh_student(setup))
        assert self.state is not None
        weights = sampler.compute_weights(self.state.params)
        group = config.rollout.samples_per_prompt
        grouped = [prompt for prompt in self.batch.prompts for _ in range(group)]
        sampled_s = []
        for _ in range(3):
            began = time.perf_counter()
            key = key_for(config.seed, 1, Stream.ROLLOUT)
            self.rollout = sampler.generate(weights, grouped, key)
            sampled_s.append(time.perf_counter() - began)
        self.sample_s = min(sampled_s[1:])
        self.method = Method(setup, self.rollout, grader, folder)

    @staticmethod
    def read(setup: Setup, config: ConfigDict) -> data.Batch:
        """Return the first prompts of the training data."""
        return setup.read([setup.train[i] for i in range(config.rollout.prompts_per_step)])


def fresh_student(setup: Setup) -> Any:
    """Return the student's weights as float32 masters."""
    return load_weights(setup, student=True).student


def compare(plain: Baseline, config: ConfigDict, method: Method, pairs: int) -> list[str]:
    """Return the cells of the method's row, without its name."""
    batch = Baseline.read(method.setup, config)
    own: TrainState | None = None
    if config.teacher.follow != "frozen":  # its state has one more copy of the weights
        own = method.functions.initial_state(fresh_student(method.setup))
    number, figures = 0, []
    for i in range(WARM + pairs):
        seconds: list[Any] = [None, None]
        for which in (0, 1) if i % 2 else (1, 0):
            number += 1
            if which and own is not None:
                own, seconds[1] = method.run(number, own, batch)
                continue
            state, plain.state = plain.state, None
            one, given = (method, batch) if which else (plain.method, plain.batch)
            plain.state, seconds[which] = one.run(number, state, given)
        if i >= WARM:
            figures.append(seconds)
    all_s = np.array(figures)  # [pairs, 2, 3]
    whole, score, rows = (all_s[:, :, i] for i in range(3))

    def ratio(x: np.ndarray) -> str:
        middle, low, high = interval(x[:, 1] / x[:, 0])
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    row_ms = [f"{1e3 * np.median(rows[:, i]):.1f}" for i in (0, 1)]
    return [
        f"{np.median(whole[:, 0]):.3f}", f"{np.median(score[:, 0]):.3f}", ratio(whole), ratio(score),
        ratio(whole - score), " / ".join(row_ms), ratio(whole + plain.sample_s),
    ]  # fmt: skip


def programs_of(config: ConfigDict) -> dict[str, str]:
    """Return every program of a step, lowered, by its name."""
    setup = make_setup(config)
    functions = make_step_functions(setup.spec)
    models = [decoder.abstract_params(m) for m in (setup.teacher, setup.reference) if m]
    teacher = models[0] if setup.teacher and config.teacher.follow == "frozen" else None
    reference = models[-1] if setup.terms.needs_reference else None
    programs = functions.programs(teacher, reference, setup.terms.weights)
    return {p.name: p.function.lower(*p.args, **p.kwargs).as_text() for p in programs}


def print_programs(names: Sequence[str], options: argparse.Namespace) -> None:
    """Print which programs of each method's step plain OPD's step does not have."""
    known: dict[str, dict[str, str]] = {}
    for name in names:
        config = config_of(name, options)
        base = baseline_of(config, options)
        if str(base) not in known:
            known[str(base)] = programs_of(base)
        texts = known[str(base)].values()
        other = [name for name, text in programs_of(config).items() if text not in texts]
        print(f"{name}: {', '.join(other) or 'none'}", flush=True)


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", help="a model folder, for the recipe smollm2-135m")
    parser.add_argument("--teacher", help="a model folder; default: the recipe's teacher")
    parser.add_argument("--only", action="append", help="a method, or NAME.. for it and all later")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--programs", action="store_true", help="which differ from OPD's")
    options = parser.parse_args()
    options.recipe = "smollm2-135m" if options.student else "tiny"
    names = list(methods.METHODS)
    chosen = []
    for name in options.only or names:
        first = name.removesuffix("..")
        chosen += names[names.index(first) :] if name.endswith("..") else [first]
    if options.programs:
        print_programs(chosen, options)
        return
    heads = (
        "method", "OPD s", "of which scoring", "step", "scoring", "all but scoring",
        "rows ms, OPD / method", "with the sampling",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads), flush=True)
    with contextlib.ExitStack() as stack:
        grader = stack.enter_context(make_grader(opd.get_config().grading))
        grader.start()
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        aot.cache_programs(
            {"XDG_CACHE_HOME": str(folder)}
        )  # a method with OPD's programs loads them
        plain, last = None, ""
        for name in chosen:
            config = config_of(name, options)
            base = baseline_of(config, options)
            if plain is None or last != str(base):
                plain, last = Baseline(base, grader, folder), str(base)
            method = Method(make_setup(config), plain.rollout, grader, folder)
            cells = compare(plain, config, method, options.pairs)
            print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    host_memory.keep_freed()
    host_memory.configure_jax()
    main()
