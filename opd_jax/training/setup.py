"""Everything about a run that can be checked before its weights are loaded."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from opd_jax import data, hardware, host_memory, models
from opd_jax.config.validate import validate
from opd_jax.data.length_filter import (
    Misfit,
    golden_misfit,
    prompt_misfit,
    teacher_misfit,
    unknown_id,
    unread_misfit,
    without_misfits,
)
from opd_jax.errors import ConfigError, ModelError
from opd_jax.sharding import multihost
from opd_jax.sharding.mesh import Mesh, make_mesh
from opd_jax.training import horizon, model_limits
from opd_jax.training.model_limits import teacher_response
from opd_jax.training.replay import Replay, check_problems, check_rewards, open_replay
from opd_jax.training.rewards import column_value
from opd_jax.training.roles import (
    architecture,
    ask_for_full_products,
    compute_dtype,
    golden_end,
    open_model,
    prompt_styles,
    reference_end_ids,
    resolved,
    same_prompts,
)
from opd_jax.training.step_functions import StepSpec
from opd_jax.training.terms import Terms, make_terms, warnings

_GENERATED_CHECKED = 2048  # of generated problems: their prompts are all alike
_SPANS_CHECKED = 128  # texts in which spans are counted


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked config and what follows from it.

    Attributes:
      config: the config with `steps` resolved. mesh: the devices.
      student, teacher: architectures; teacher is None where no term needs one.
      reference: architecture of the reference; `reference_section.path` holds its weights.
      tokenizer, teacher_tokenizer: of student and teacher (the same object without a teacher).
      student_style, teacher_style: prompt templates of both.
      separate_prompts: whether the teacher reads prompts or ids of its own.
      alignment: which ids mean the same to both.
      reader: how a teacher with another tokenizer reads responses; None where the two share ids.
      first_pieces: groups of ids whose first occurrence in a response is not scored.
      golden_end: end token of golden solutions.
      width, teacher_width: tokens of a row, prompt and response together.
      train, held_out: problems. prompts, teacher_prompts: ids of the held-out problems' prompts.
      jump_problems, jump_prompts: training problems that are held for jumps, and their prompts.
      notes: lines for the start of the run.
      replay: the recording that training reads instead of sampling; None without. Then there is no teacher.
    """

    config: ConfigDict
    mesh: Mesh
    terms: Terms
    student: models.ModelConfig
    teacher: models.ModelConfig | None
    reference: models.ModelConfig
    reference_section: Any
    tokenizer: data.Tokenizer
    teacher_tokenizer: data.Tokenizer
    student_style: data.PromptStyle
    teacher_style: data.PromptStyle
    separate_prompts: bool
    alignment: data.Alignment
    reader: data.Reader | None
    first_pieces: tuple[tuple[int, ...], ...]
    golden_end: int
    width: int
    teacher_width: int
    train: Sequence[data.Problem]
    held_out: Sequence[data.Problem]
    prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    jump_problems: list[data.Problem]
    jump_prompts: list[list[int]]
    notes: list[str]
    replay: Replay | None = None

    @property
    def spec(self) -> StepSpec:
        """Everything that decides which programs a step compiles."""
        return StepSpec(
            config=self.config,
            terms=self.terms,
            student=self.student,
            teacher=self.teacher,
            reference=self.reference,
            alignment=self.alignment,
            dtype=compute_dtype(self.config.student.dtype),
            teacher_width=self.teacher_width if self.separate_prompts else 0,
            mesh=self.mesh,
            tile=hardware.tile(gpu=jax.default_backend() == "gpu"),
            replayed=self.replay is not None,
        )

    @property
    def teacher_response(self) -> int:
        """Most tokens of a response in the teacher's rows."""
        return teacher_response(self.config, spans=self.reader is not None)

    def read(self, problems: list[data.Problem]) -> data.Batch:
        """Tokenize the problems of a step."""
        teacher_prompts, golden = None, []
        if self.separate_prompts:
            teacher_prompts = self.teacher_style.prompts(problems, self.teacher_tokenizer)
        if self.terms.needs_golden:
            solutions = self.student_style.golden(problems, self.tokenizer)
            golden = [[*ids, self.golden_end] for ids in solutions]
        prompts = self.student_style.prompts(problems, self.tokenizer)
        return data.Batch(problems, prompts, teacher_prompts, golden)


def make_setup(config: ConfigDict, mesh: Mesh | None = None) -> Setup:
    """Read and check everything but the weights; write and compile nothing.

    `mesh` replaces the devices of the config. Raises an OpdError for any input that cannot be used.
    """
    validate(config)
    hardware.require_supported(jax.default_backend())
    terms = make_terms(config)
    mesh = mesh or make_mesh(config.mesh)
    config = resolved(
        config,
        ["student"] + terms.needs_teacher * ["teacher"] + terms.needs_reference * ["reference"],
    )
    config.eval.samples = config.eval.samples or 1  # a file of one's own has no number of its own
    today = config.data.date or datetime.date.today().isoformat()
    student, tokenizer = open_model(config.student, today)
    has_path = terms.needs_reference and config.reference.path
    reference_section = config.reference if has_path else config.student
    reference = architecture(reference_section)
    end = golden_end(student, tokenizer, config.student.path)
    reference_ends: tuple[int, ...] = ()
    if has_path:
        reference_ends = reference_end_ids(reference, reference_section.path, tokenizer)
    teacher, teacher_tokenizer, reader = None, tokenizer, None
    used = ["student"] + terms.needs_teacher * ["teacher"] + terms.needs_reference * ["reference"]
    notes = ask_for_full_products([config[role].dtype for role in used])
    notes += data.prompt_notes("student", tokenizer)
    if terms.needs_teacher:
        teacher, teacher_tokenizer = open_model(config.teacher, today)
        notes += data.prompt_notes("teacher", teacher_tokenizer)
        vocabularies = (
            data.Vocabulary(tokenizer, student.vocab_size, student.eos_token_ids),
            data.Vocabulary(teacher_tokenizer, teacher.vocab_size, teacher.eos_token_ids),
        )
        if by_spans(config, *vocabularies):
            model_limits.check_spans(config, terms)
            alignment, reader = data.align_text(
                *vocabularies, end=end, reference_ends=reference_ends
            )
        else:
            alignment = data.align(
                *vocabularies, special_tokens=config.scoring.special_tokens,
                end=end, reference_ends=reference_ends,
            )  # fmt: skip
            notes += data.alignment_report(alignment, *vocabularies)
    else:
        vocabulary = min(tokenizer.size, student.vocab_size)
        alignment = data.alone(
            vocabulary, student.eos_token_ids, end=end, reference_ends=reference_ends
        )
        notes.append(data.ends_line(alignment, tokenizer))
    if ordinary := sorted(set(alignment.foreign_ends) - tokenizer.added()):
        raise ModelError(
            f"{data.named(tokenizer, ordinary)} ends a response for the teacher or the reference and is "
            "an ordinary token to the student, wanted a special token; correct eos_token_id in their "
            "config.json and generation_config.json"
        )
    if tokenizer.prints_date or teacher_tokenizer.prints_date:
        config.data.date = today
    model_limits.check_rollouts(config, terms, student, teacher, reference, alignment)
    folders = {config.student.path: ("student", student)}
    replay = None
    if config.replay.path:
        replay = open_replay(
            config, tokenizer, teacher_tokenizer if terms.needs_teacher else None,
            places=terms.scored_support[1] if terms.scored_support else 0,
        )  # fmt: skip
        if terms.needs_reward:
            check_rewards(replay)
        teacher = None  # its tokenizer alone is read
        notes.append(replay.describe())
    if teacher is not None:
        folders.setdefault(config.teacher.path, ("teacher", teacher))
    if terms.needs_reference:
        folders.setdefault(reference_section.path, ("reference", reference))
    for path, (role, model_config) in folders.items():
        notes += [f"{role}: {line}" for line in models.check_weights(path, model_config)]
    notes += [*warnings(terms), *_temperatures(config, terms)]
    notes += [
        f"{role}: {config[role].path} is not read, because no term of this loss needs it"
        for role, needed in (("teacher", terms.needs_teacher), ("reference", terms.needs_reference))
        if config[role].path and not needed
    ]
    first_pieces = tuple(_pieces(text, tokenizer) for text in config.scoring.mask_first)
    if ends := sorted(set(alignment.stop_ids) & {i for ids in first_pieces for i in ids}):
        notes.append(
            f"note: scoring.mask_first holds {data.named(tokenizer, ends)}, an end token: only golden "
            "solutions can then teach the student to end with it"
        )
    for role, model in (("student", student), ("teacher", teacher), ("reference", reference)):
        if model is not None:
            mesh.check(role, model)
    notes += [mesh.describe()] * (mesh.devices is not None)
    notes += host_memory.lines()
    if terms.needs_reference and reference.vocab_size < alignment.vocabulary:
        raise ModelError(
            f"{reference_section.path}: the reference has {reference.vocab_size} ids, fewer than the "
            f"student's {alignment.vocabulary}; set --config.reference.path to a model with the "
            "student's tokenizer"
        )
    styles = prompt_styles(config.data)
    shows_answer = any("{answer}" in style.template for style in styles)
    needs_solution = terms.needs_golden or any("{solution}" in s.template for s in styles)
    by_verdict = not (config.reward.function or config.reward.column)
    train = data.open_problems(
        config.data.train, field="data.train", columns=config.data.columns, size=config.data.size,
        need_solution=needs_solution,
        need_answer=shows_answer or (terms.needs_reward and by_verdict) or bool(config.jump.problems),
        bad_rows=config.data.bad_rows, shown=tuple(dict.fromkeys(styles[0].columns + styles[1].columns)),
    )  # fmt: skip
    held_out = None
    if config.eval.data:
        privileged = "{solution}" in styles[1].template
        asked = styles if config.eval.teacher else styles[:1]
        held_out = data.open_problems(
            config.eval.data, field="eval.data", columns=config.data.columns,
            size=config.eval.problems or data.TEST_SIZE, need_solution=privileged and config.eval.teacher,
            need_answer=shows_answer or not config.eval.match, bad_rows=config.data.bad_rows,
            shown=tuple(dict.fromkeys(name for style in asked for name in style.columns)),
        )  # fmt: skip
    setup = Setup(
        config=config,
        mesh=mesh,
        terms=terms,
        student=student,
        teacher=teacher,
        reference=reference,
        reference_section=reference_section,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        student_style=styles[0],
        teacher_style=styles[1],
        separate_prompts=teacher is not None
        and (
            styles[0] != styles[1]
            or reader is not None
            or bool(alignment.differing)
            or not same_prompts(tokenizer, teacher_tokenizer)
        ),
        alignment=alignment,
        reader=reader,
        first_pieces=first_pieces,
        golden_end=end,
        width=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        teacher_width=0,
        train=train,
        held_out=[],
        prompts=[],
        teacher_prompts=[],
        jump_problems=[],
        jump_prompts=[],
        notes=notes,
        replay=replay,
    )
    setup = _with_data(setup, train, held_out)
    if replay is not None:
        check_problems(replay, setup.train, "data.train")
    if reader is not None:
        setup.notes.extend(_span_notes(setup, reader, *vocabularies))
    if setup.held_out:
        longest = setup.teacher_width - setup.teacher_response
        model_limits.check_held_out(config, student, teacher, teacher_prompt=longest)
    return setup


def by_spans(config: ConfigDict, student: data.Vocabulary, teacher: data.Vocabulary) -> bool:
    """Return whether the two are compared by spans of text: as configured, or where ordinary ids differ."""
    compare = config.scoring.compare
    return compare == "spans" or (compare == "auto" and not data.share_ids(student, teacher))


def _span_notes(
    setup: Setup, reader: data.Reader, student: data.Vocabulary, teacher: data.Vocabulary
) -> list[str]:
    """Return what the start of a run logs about spans, measured on solutions or, without, on problems."""
    problems = [setup.train[i] for i in range(min(len(setup.train), _SPANS_CHECKED))]
    texts = [problem.solution for problem in problems if problem.solution]
    what = "golden solutions" if texts else "problems"
    texts = texts or [problem.question for problem in problems]
    return data.spans_report(
        setup.alignment,
        reader,
        student,
        teacher,
        texts,
        source=f"{len(texts)} {what} of data.train",
    )


def _temperatures(config: ConfigDict, terms: Terms) -> list[str]:
    """Return a note where rollouts are scored at another temperature than they are sampled at."""
    sampled_at, scored_at = config.rollout.temperature, config.scoring.temperature
    if not terms.needs_rollouts or sampled_at in (0, scored_at):
        return []
    return [
        f"note: rollouts are sampled at temperature {sampled_at:g} and scored at {scored_at:g}: the "
        "expectation of the advantage is not the KL of the sampling distribution; "
        f"--config.scoring.temperature={sampled_at:g} scores that distribution"
    ]


def _pieces(text: str, tokenizer: data.Tokenizer) -> tuple[int, ...]:
    """Return every id that stands for the text, as it is or after a space."""
    known = tokenizer.vocabulary()
    ids = {ids[0] for ids in map(tokenizer.encode, (text, " " + text)) if len(ids) == 1}
    ids |= {known[text]} if text in known else set()
    if not ids:
        raise ConfigError(
            f"scoring.mask_first holds {text!r}, which is not a single token of the student's "
            f"tokenizer; list its tokens one by one, such as "
            f"{tokenizer.hf.convert_ids_to_tokens(tokenizer.encode(text))}"
        )
    return tuple(sorted(ids))


def _with_data(setup: Setup, train: data.Problems, benchmark: data.Problems | None) -> Setup:
    """Return the setup with the problems that fit, `steps` resolved, and the held-out prompts."""
    config = setup.config
    train, longest = _fitting(setup, train, "data.train", golden=setup.terms.needs_golden)
    train, jump_problems = _held_for_jumps(config, train)
    notes = [*setup.notes, f"data: {train.describe()}"]
    held_out: list[data.Problem] = []
    if benchmark is not None:
        benchmark, longest_held_out = _fitting(setup, benchmark, "eval.data", golden=False)
        longest = max(longest, longest_held_out)
        held_out = benchmark[: config.eval.problems or None]
        notes.append(f"held out: {benchmark.describe()}; the first {len(held_out)} are measured")
    if config.data.epochs:
        config.steps = max(
            round(config.data.epochs * len(train) / config.rollout.prompts_per_step), 1
        )
        notes.append(
            f"steps: {config.steps}, that is data.epochs={config.data.epochs:g} of "
            f"{len(train)} problems, {config.rollout.prompts_per_step} a step"
        )
    notes += horizon.describe(horizon.make_rules(config), config.steps)
    if not setup.tokenizer.has_template:
        notes.append("prompts: plain text, because the student's tokenizer has no chat template")
    return dataclasses.replace(
        setup,
        train=train,
        held_out=held_out,
        prompts=setup.student_style.prompts(held_out, setup.tokenizer),
        teacher_prompts=setup.teacher_style.prompts(held_out, setup.teacher_tokenizer),
        jump_problems=jump_problems,
        jump_prompts=setup.student_style.prompts(jump_problems, setup.tokenizer),
        teacher_width=longest + setup.teacher_response,
        notes=notes,
    )


def _held_for_jumps(
    config: ConfigDict, train: data.Problems
) -> tuple[data.Problems, list[data.Problem]]:
    """Return the problems to train on and `jump.problems` others, drawn from the seed."""
    count = config.jump.problems
    if not count:
        return train, []
    if multihost.several():
        raise ConfigError(
            f"jump.problems={count} in a run of several processes, wanted one process: snapshots of weights "
            "that are divided over processes are not built; set --config.jump.problems=0"
        )
    if count >= len(train):
        raise ConfigError(
            f"jump.problems={count} leaves none of the {len(train)} problems of data.train; set "
            f"--config.jump.problems={max(len(train) // 10, 1)} or name a larger file"
        )
    indices = np.random.default_rng(config.seed).choice(len(train), count, replace=False)
    held = [train[int(index)] for index in indices]
    return train.without({"held for jumps": indices.tolist()}), held


def _fitting(
    setup: Setup, problems: data.Problems, field: str, *, golden: bool
) -> tuple[data.Problems, int]:
    """Return the problems that fit their token budgets, and the length of the teacher's longest prompt.

    The budgets are those of prompts and, with `golden`, of golden solutions. Raises DataError at the first
    problem that exceeds one, unless data.bad_rows = "skip".
    """
    styles = (setup.student_style, setup.teacher_style)
    shows_solution = any("{solution}" in style.template for style in styles)
    alike = problems.generated and not shows_solution and not golden
    count = min(len(problems), _GENERATED_CHECKED) if alike else len(problems)
    longest = setup.config.rollout.max_prompt_tokens
    rewarded = setup.config.reward.column if field == "data.train" else ""
    unread = _unread_tokens(setup) if golden and setup.terms.golden_divergence else {}

    def misfits(block: list[data.Problem]) -> list[Misfit | None]:
        nonlocal longest
        texts = setup.student_style.texts(block, setup.tokenizer)
        prompts = setup.tokenizer.prompt_ids(texts)
        teacher_prompts: list[list[int]] = [[]] * len(block)
        if setup.separate_prompts:
            teacher_prompts = setup.teacher_style.prompts(block, setup.teacher_tokenizer)
        reasons = [_misfit(setup, *ids) for ids in zip(prompts, teacher_prompts, strict=True)]
        if rewarded:
            reasons = [
                reason or _reward_misfit(problem, rewarded)
                for reason, problem in zip(reasons, block, strict=True)
            ]
        if golden:
            rollout = setup.config.rollout
            reasons = [
                reason
                or golden_misfit(
                    block[i], texts[i], len(prompts[i]), setup.student_style, setup.tokenizer,
                    rows=setup.student.vocab_size, width=setup.width,
                    response=rollout.max_response_tokens,
                )
                for i, reason in enumerate(reasons)
            ]  # fmt: skip
            if setup.terms.golden_divergence:
                reasons = [
                    reason or _unread(setup, problem, unread)
                    for problem, reason in zip(block, reasons, strict=True)
                ]
        pairs = zip(teacher_prompts, reasons, strict=True)
        longest = max([longest, *(len(ids) for ids, reason in pairs if reason is None)])
        return reasons

    skip = setup.config.data.bad_rows == "skip"
    return without_misfits(problems, misfits, field=field, count=count, skip=skip), longest


def _reward_misfit(problem: data.Problem, column: str) -> Misfit | None:
    """Return why the column of the reward cannot be used for a problem, or None."""
    value = column_value(problem, column)
    return ("no reward", value) if isinstance(value, str) else None


def _unread_tokens(setup: Setup) -> dict[int, str]:
    """Return the text of each id that means something else to the teacher; rollouts never hold them."""
    ids = np.flatnonzero(~setup.alignment.drawn).tolist()
    texts = {i: setup.tokenizer.decode([i], special=True) for i in ids}
    # A piece of a character has no text of its own: it may be in any solution.
    return {i: "" if "\ufffd" in text else text for i, text in texts.items()}


def _unread(setup: Setup, problem: data.Problem, unread: dict[int, str]) -> Misfit | None:
    """Return why the teacher cannot read a golden solution as the student does, or None."""
    return unread_misfit(
        problem,
        lambda: setup.student_style.golden([problem], setup.tokenizer)[0],
        unread=unread,
        response=setup.config.rollout.max_response_tokens if setup.separate_prompts else None,
    )


def _misfit(setup: Setup, prompt: list[int], teacher_prompt: list[int]) -> Misfit | None:
    """Return why a problem does not fit, or None; `teacher_prompt` is empty where it is the student's."""
    rollout = setup.config.rollout
    if misfit := prompt_misfit(len(prompt), rollout.max_prompt_tokens):
        return misfit
    readers = {"student": setup.student.vocab_size}
    if setup.terms.needs_reference:
        readers["reference"] = setup.reference.vocab_size
    if setup.teacher is not None:
        rows = {"teacher": setup.teacher.vocab_size}
        misfit = teacher_misfit(
            len(teacher_prompt), setup.teacher.max_position, setup.teacher_response
        )
        if misfit and setup.reader is not None:
            misfit = misfit[0], misfit[1] + ", or a smaller --config.scoring.span_room"
        misfit = misfit or unknown_id(
            teacher_prompt, setup.teacher_tokenizer, what="teacher's prompt", rows=rows
        )
        if misfit:
            return misfit
        readers |= {} if setup.separate_prompts else rows
    return unknown_id(prompt, setup.tokenizer, what="prompt", rows=readers)
