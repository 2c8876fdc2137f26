"""launch/record.py: sample the rollouts of a run once, score them with the teacher, and keep them.

Lightning OPD (2604.13010). Step n samples the problems and draws the keys that step n of a run with this
config would have if its student did not change, so the first step of a run from the recording equals
that of the live run. A recording that was interrupted goes on after its last complete file.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from opd_jax import data
from opd_jax.checkpoint.manifest import GIB, free_bytes
from opd_jax.config.validate import check_replayable, validate
from opd_jax.errors import ConfigError, Interrupted
from opd_jax.grading import rewards
from opd_jax.grading.grader import make_grader
from opd_jax.memory_plan import failures
from opd_jax.memory_plan import run as planning
from opd_jax.metrics.timing import Clock
from opd_jax.rng import Stream, key_for
from opd_jax.training import recording, replay
from opd_jax.training.experience import Collector
from opd_jax.training.make_setup import make_setup
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.weights import load_weights
from opd_jax.workdir import console, obstacle
from opd_jax.workdir.stop import Stop


class _Numbered(Sequence):
    """Problems as (place in the data, problem)."""

    def __init__(self, problems: Sequence[data.Problem]):
        self._problems = problems

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, place: Any) -> Any:
        return place, self._problems[place]


def run(config: ConfigDict, out: str, *, stop: Stop | None = None) -> pathlib.Path:
    """Record `config.steps` steps of rollouts into the folder `out`, and return it.

    Raises an OpdError for every error that the user can correct; Interrupted where `stop` requests an end.
    """
    folder, stop = pathlib.Path(out), stop or Stop()
    config = config.copy_and_resolve_references()
    if config.replay.path:
        raise ConfigError(
            f"replay.path={config.replay.path} is read by launch/train.py; the folder to write is --out"
        )
    validate(config)
    check_replayable(config, "launch/record.py: a recording")
    if above := obstacle(folder):
        raise ConfigError(
            f"--out={out} cannot be written ({above} is read-only or not a folder); give another folder"
        )
    setup = make_setup(config)
    config, terms = setup.config, setup.terms
    if setup.reader is not None:
        raise ConfigError(
            f"teacher.path={config.teacher.path} and student.path={config.student.path} are compared by "
            "spans of text (docs/spans.md), and a recording has the teacher's log-probs of the student's own "
            "tokens; set --config.scoring.compare=auto and --config.teacher.path to a model with the "
            "student's tokenizer"
        )
    places = terms.scored_support[1] if terms.scored_support else 0
    teacher_tokenizer = setup.teacher_tokenizer if terms.needs_teacher else None
    header = replay.header(config, setup.tokenizer, teacher_tokenizer, places=places)
    writer = replay.Writer(folder, header)
    if len(writer.shards) >= config.steps:
        print(f"{folder} is complete already: {len(writer.shards)} steps", flush=True)
        return folder
    if fault := rewards.fault_of(config.reward):
        raise ConfigError(fault)
    plan = planning.of_run(setup)
    print(*setup.notes, *planning.say(plan), size(setup, places, folder), sep="\n", flush=True)
    planning.require_fit(plan)
    with failures.explained(folder, plan):
        _record(setup, writer, places, stop)
    print(f"written to {folder}; train with --config.replay.path={folder}", flush=True)
    return folder


def size(setup: Setup, places: int, folder: pathlib.Path) -> str:
    """Return the line about the bytes of a recording, before anything is written."""
    config = setup.config
    each = recording.bytes_per_token(places, teacher=setup.teacher is not None)
    section = config.rollout
    rollouts = config.steps * section.prompts_per_step * section.samples_per_prompt
    longest = rollouts * (section.max_response_tokens * each + section.max_prompt_tokens * 4)
    return (
        f"recording: {each} bytes a response token, 4 a prompt token; {rollouts:,} rollouts take at most "
        f"{longest / GIB:.3f} GiB, {free_bytes(folder) / GIB:.1f} are free"
    )


def _record(setup: Setup, writer: replay.Writer, places: int, stop: Stop) -> None:
    """Record the steps that the writer does not have yet."""
    config = setup.config
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=True)
    functions = functions.beside(weights.base)
    assert weights.student is not None
    student = functions.compute_weights(weights.student)
    batches = data.make_batches(
        _Numbered(setup.train),
        batch=config.rollout.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        read=lambda pairs: ([place for place, _ in pairs], setup.read([p for _, p in pairs])),
    )
    first = len(writer.shards)
    for _ in range(first):
        next(batches)
    progress = console.Progress(config.steps, first)
    if first:
        progress.say(f"resumed: {first} steps are recorded")
    pool = rewards.make_pool(config.reward, log=writer.folder.with_suffix(".reward.log"))
    grader = make_grader(config.grading)
    try:
        collector = Collector(setup, functions, grader, pool)
        for step in range(first + 1, config.steps + 1):
            if stop.reason is not None:
                raise Interrupted(
                    f"{stop.reason}: {step - 1} steps are recorded in {writer.folder}; run the same command "
                    "again to go on"
                )
            numbers, batch = next(batches)
            clock = Clock()
            experience = collector.collect(
                student, weights.scorer, batch,
                key=key_for(config.seed, step, Stream.ROLLOUT), clock=clock,
            )  # fmt: skip
            arrays = recording.pack(
                experience.rollout, experience.scores,
                grades=experience.grades, rewards=experience.external, places=places,
            )  # fmt: skip
            ids = [problem.id for problem in batch.problems]
            writer.add(arrays, list(zip(numbers, ids, strict=True)))
            progress.step(step, clock.row() | collector.measure(experience))
    finally:
        grader.close()
        if pool is not None:
            pool.close()
