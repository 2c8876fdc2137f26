"""A training run from its config to its first step; its loop is train_loop.py, one step training/step.py.

Everything that can be refused is refused (training/make_setup.py, workdir.check)
before a file is written, weights are loaded, or anything is compiled.
"""

import contextlib
import pathlib
from typing import Any

from ml_collections import ConfigDict

from opd_jax import checkpoint, workdir
from opd_jax import config as configuration
from opd_jax.checkpoint import manifest, resume
from opd_jax.errors import ConfigError
from opd_jax.evaluation.held_out import discard_after
from opd_jax.grading import rewards
from opd_jax.grading.grader import make_grader
from opd_jax.memory_plan import failures
from opd_jax.memory_plan import run as planning
from opd_jax.metrics.tracing import stage
from opd_jax.sharding import multihost
from opd_jax.train_loop import Result, TrainLoop, end_if_requested
from opd_jax.training.make_setup import make_setup
from opd_jax.training.replay import student_fault
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.weights import load_weights
from opd_jax.workdir.stop import Stop
from opd_jax.workdir.trackers import require
from opd_jax.workdir.watchdog import Watchdog


def run(
    config: ConfigDict,
    path: str,
    *,
    command: list[str],
    stop: Stop | None = None,
    accept_changes: bool = False,
) -> Result:
    """Train to `config.steps`, resuming where the workdir holds a checkpoint.

    With `accept_changes` it may continue with a config that computes something else; run.json records that.
    Raises an OpdError for every error that the user can fix; Interrupted where `stop` requests an end.
    """
    stop = stop or Stop()
    folder = pathlib.Path(path)
    config = config.copy_and_resolve_references()
    config.data.date = config.data.date or workdir.date_of(folder)  # so that prompts do not change
    setup = make_setup(config)
    config = setup.config
    stop.limit(config.checkpoint)
    if multihost.several():
        multihost.agree(_facts(config, path))
    changes = workdir.check(folder, config, accept=accept_changes)
    multihost.agree({})  # every process has checked the folder before process 0 writes
    if multihost.first():
        print(f"workdir {folder}", *setup.notes, sep="\n", flush=True)
    first, damaged = manifest.newest(folder)
    if multihost.first():
        print(*damaged, sep="\n", end="\n" * bool(damaged), flush=True)
    if first is not None and first > config.steps:
        raise ConfigError(
            f"steps={config.steps}, but the workdir {str(folder)!r} is at step {first}; "
            f"set --config.steps={first} or more, or give a new --workdir"
        )
    moved = multihost.from_first(
        lambda: [] if first is None else resume.schedule_moved(folder, config),
    )
    if multihost.first():
        print(*moved, sep="\n", end="\n" * bool(moved), flush=True)
    require(config.log)
    plan = planning.of_run(setup)
    if multihost.first():
        print(*planning.say(plan), sep="\n", flush=True)
    planning.require_fit(plan)
    if fault := multihost.from_first(lambda: _fault_outside(setup)):
        raise ConfigError(fault)
    functions = make_step_functions(setup.spec)
    resume.require_disk(functions, folder, first or 0)
    end_if_requested(stop, "before anything was loaded")
    with failures.explained(folder, plan), Watchdog(config.watchdog) as watchdog:
        watchdog.begin("start")
        # A broken file is refused before anything is written.
        with stage("load"):
            weights = load_weights(setup, student=first is None)
        functions = functions.beside(weights.base)
        if multihost.first():
            workdir.create(folder, config, command, changes=changes)
            planning.write(plan, folder)
        if changes or moved:  # after the checkpoint the trajectory will differ
            discard_after(folder, first or 0)
        with (
            make_grader(config.grading) as grader,
            contextlib.ExitStack() as stack,
            checkpoint.Checkpoints(folder, keep=config.checkpoint.keep) as saved,
        ):
            pool = None
            if multihost.first():  # only process 0 grades and calls the reward function
                grader.start()
                if setup.replay is None:
                    pool = rewards.make_pool(config.reward, log=folder / "reward.log")
                if pool is not None:
                    stack.enter_context(pool)
            training = TrainLoop(
                setup, functions, weights, folder, grader, saved, stop, watchdog, pool
            )
            with contextlib.closing(training.log), contextlib.closing(training.samples):
                return training.run()


def _fault_outside(setup: Setup) -> str:
    """Return "" or one line: a reward function that is not there, or a student that was not recorded."""
    config = setup.config
    if setup.replay is None:
        return rewards.fault_of(config.reward)
    if config.replay.other_student:
        return ""
    return student_fault(setup.replay, config.student.path)


def _facts(config: ConfigDict, path: str) -> dict[str, Any]:
    """Return the facts that must be the same in every process of a run."""
    provenance = workdir.provenance([])
    versions = {name: provenance[name] for name in ("commit", "python", "packages")}
    return {"workdir": path} | versions | configuration.flatten(config.to_dict())
