"""What is known of a run before its weights are loaded: everything that can be refused, refused here."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import data, hardware, host_memory, models
from opd_jax.config import validate
from opd_jax.data.length_filter import (
    Misfit,
    golden_misfit,
    prompt_misfit,
    teacher_misfit,
    unknown_id,
    without_misfits,
)
from opd_jax.errors import ConfigError, ModelError
from opd_jax.models.end_tokens import Events
from opd_jax.sharding.mesh import Mesh, make_mesh
from opd_jax.training import objective
from opd_jax.training.objective import make_terms
from opd_jax.training.roles import (
    _reference_ends,
    _same_prompts,
    architecture,
    golden_end,
    open_model,
    prompt_styles,
    resolved,
)

_GENERATED_CHECKED = 2048  # generated prompts are all alike, their solutions are not


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked config and what follows from it.

    Attributes:
      config: as given, with `steps` resolved. mesh: the devices.
      student, teacher: architectures; teacher is None where no term needs one.
      reference: architecture of the reference; its weights lie in `reference_section.path`.
      tokenizer, teacher_tokenizer: the student's and the teacher's (the same object without one).
      student_style, teacher_style: how each is shown a problem.
      separate_prompts: whether the teacher reads rows of its own.
      alignment: which ids mean the same to both.
      first_pieces: groups of ids whose first occurrence in a response is not scored.
      golden_end: end token of golden solutions.
      width, teacher_width: tokens of a whole row, prompt and response.
      train, held_out: problems; prompts, teacher_prompts: of the held-out ones, as ids.
      notes: lines for the start of the run.
    """

    config: ConfigDict
    mesh: Mesh
    terms: objective.Terms
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
    first_pieces: tuple[tuple[int, ...], ...]
    golden_end: int
    width: int
    teacher_width: int
    train: Sequence[data.Problem]
    held_out: Sequence[data.Problem]
    prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    notes: list[str]

    def read(self, problems: list[data.Problem]) -> data.Batch:
        """The problems of a step as ids."""
        theirs, golden = None, []
        if self.separate_prompts:
            theirs = self.teacher_style.prompts(problems, self.teacher_tokenizer)
        if self.terms.needs_golden:
            solutions = self.student_style.golden(problems, self.tokenizer)
            golden = [[*ids, self.golden_end] for ids in solutions]
        prompts = self.student_style.prompts(problems, self.tokenizer)
        return data.Batch(problems, prompts, theirs, golden)


def make_setup(config: ConfigDict, mesh: Mesh | None = None) -> Setup:
    """Read and check all but the weights. Raises an OpdError; writes and compiles nothing.

    `mesh`: the devices, where that is not for the config to say.
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
    own = terms.needs_reference and config.reference.path
    reference_section = config.reference if own else config.student
    reference = architecture(reference_section)
    end = golden_end(student, tokenizer, config.student.path)
    reference_ends = _reference_ends(reference, reference_section.path, tokenizer) if own else ()
    teacher, teacher_tokenizer = None, tokenizer
    notes = data.prompt_notes("student", tokenizer)
    if terms.needs_teacher:
        teacher, teacher_tokenizer = open_model(config.teacher, today)
        notes += data.prompt_notes("teacher", teacher_tokenizer)
        alignment = data.align(
            tokenizer, teacher_tokenizer,
            student_ends=student.eos_token_ids, teacher_ends=teacher.eos_token_ids,
            student_rows=student.vocab_size, teacher_rows=teacher.vocab_size,
            special_tokens=config.scoring.special_tokens,
            end=end, reference_ends=reference_ends,
        )  # fmt: skip
        notes += data.alignment_report(
            alignment, tokenizer, teacher_tokenizer, teacher_ends=teacher.eos_token_ids,
            rows=(student.vocab_size, teacher.vocab_size),
        )  # fmt: skip
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
    _check_models(config, terms, student, teacher, reference, alignment)
    folders = {config.student.path: ("student", student)}
    if teacher is not None:
        folders.setdefault(config.teacher.path, ("teacher", teacher))
    if terms.needs_reference:
        folders.setdefault(reference_section.path, ("reference", reference))
    for path, (role, of_folder) in folders.items():
        notes += [f"{role}: {line}" for line in models.check_weights(path, of_folder)]
    notes += [*objective.warnings(terms), *_temperatures(config, terms)]
    notes += [
        f"{role}: {config[role].path} is not read, no term of this loss asks it"
        for role, needed in (("teacher", terms.needs_teacher), ("reference", terms.needs_reference))
        if config[role].path and not needed
    ]
    first_pieces = tuple(_pieces(text, tokenizer) for text in config.scoring.mask_first)
    if ends := sorted(set(alignment.stop_ids) & {i for ids in first_pieces for i in ids}):
        notes.append(
            f"note: scoring.mask_first holds {data.named(tokenizer, ends)}, an end token: no term but the "
            "golden solutions can teach the student to end with it"
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
    told = any("{answer}" in style.template for style in styles)
    needs_solution = terms.needs_golden or any("{solution}" in s.template for s in styles)
    train = data.open_problems(
        config.data.train, field="data.train", columns=config.data.columns, size=config.data.size,
        need_solution=needs_solution, need_answer=told or terms.needs_reward,
        bad_rows=config.data.bad_rows,
    )  # fmt: skip
    held_out = None
    if config.eval.data:
        privileged = "{solution}" in styles[1].template
        held_out = data.open_problems(
            config.eval.data, field="eval.data", columns=config.data.columns,
            size=config.eval.problems or data.TEST_SIZE, need_solution=privileged and config.eval.teacher,
            need_answer=told or not config.eval.match, bad_rows=config.data.bad_rows,
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
            or bool(alignment.differing)
            or not _same_prompts(tokenizer, teacher_tokenizer)
        ),
        alignment=alignment,
        first_pieces=first_pieces,
        golden_end=end,
        width=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        teacher_width=0,
        train=train,
        held_out=[],
        prompts=[],
        teacher_prompts=[],
        notes=notes,
    )
    setup = _with_data(setup, train, held_out)
    _check_evaluation(setup)
    return setup


def _temperatures(config: ConfigDict, terms: objective.Terms) -> list[str]:
    """A note where rollouts are not scored at the temperature at which they are drawn."""
    drawn_at, scored_at = config.rollout.temperature, config.scoring.temperature
    if not terms.needs_rollouts or drawn_at in (0, scored_at):
        return []
    return [
        f"note: rollouts are drawn at temperature {drawn_at:g} and scored at {scored_at:g}: the "
        "expectation of the advantage is not the KL of the distribution that samples; "
        f"--config.scoring.temperature={drawn_at:g} scores what was drawn"
    ]


def _pieces(text: str, tokenizer: data.Tokenizer) -> tuple[int, ...]:
    """Every id that stands for the text: as it is, and with a space before it."""
    known = tokenizer.vocabulary()
    ids = {ids[0] for ids in map(tokenizer.encode, (text, " " + text)) if len(ids) == 1}
    ids |= {known[text]} if text in known else set()
    if not ids:
        raise ConfigError(
            f"scoring.mask_first holds {text!r}, which is not a single token of the student's "
            f"tokenizer; give its pieces one by one, such as "
            f"{tokenizer.hf.convert_ids_to_tokens(tokenizer.encode(text))}"
        )
    return tuple(sorted(ids))


def events_of(setup: Setup) -> Events:
    """What the log-probs of a run are normalised over, in sampler, scorer and losses."""
    alignment = setup.alignment
    ends = alignment.ends
    return Events(
        scored_V=None if alignment.scored.all() else alignment.scored,
        ends=None if ends is None or ends.one_token else ends,
        temperature=setup.config.scoring.temperature,
    )


def _check_models(
    config: ConfigDict,
    terms: objective.Terms,
    student: models.ModelConfig,
    teacher: models.ModelConfig | None,
    reference: models.ModelConfig,
    alignment: data.Alignment,
) -> None:
    scored = int(alignment.scored.sum())
    for field, k in (
        ("scoring.overlap_top_k", config.scoring.overlap_top_k if teacher else 0),
        ("loss.top_k", config.loss.top_k if terms.scored_support else 0),
    ):
        if k > scored:
            raise ConfigError(
                f"{field}={k} is more than the {scored} ids that the models share; "
                f"set --config.{field}={scored}"
            )
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    roles = {"student": student, "teacher": teacher}
    if terms.needs_reference and config.reference.path:
        roles["reference"] = reference
    for role, model in roles.items():
        if model is not None and width > model.max_position:
            room = max(model.max_position - config.rollout.max_prompt_tokens, 1)
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {width} is more than "
                f"the {role}'s {model.max_position} positions; "
                f"set --config.rollout.max_response_tokens={room} or less, or stretch the model: "
                f"--config.{role}.max_position={width} (with a larger --config.{role}.rope_theta "
                "where it was not trained for that)"
            )


def _with_data(setup: Setup, train: data.Problems, benchmark: data.Problems | None) -> Setup:
    """The setup with problems whose rows fit, `steps` resolved, and the held-out prompts."""
    config = setup.config
    train, longest = _that_fit(setup, train, "data.train", golden=setup.terms.needs_golden)
    notes = [*setup.notes, f"data: {train.describe()}"]
    held_out: list[data.Problem] = []
    if benchmark is not None:
        benchmark, also = _that_fit(setup, benchmark, "eval.data", golden=False)
        longest = max(longest, also)
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
    if not setup.tokenizer.has_template:
        notes.append("prompts: plain text, for the student's tokenizer has no chat template")
    return dataclasses.replace(
        setup,
        train=train,
        held_out=held_out,
        prompts=setup.student_style.prompts(held_out, setup.tokenizer),
        teacher_prompts=setup.teacher_style.prompts(held_out, setup.teacher_tokenizer),
        teacher_width=longest + config.rollout.max_response_tokens,
        notes=notes,
    )


def _check_evaluation(setup: Setup) -> None:
    """Answers to held-out problems may be longer than rollouts: there must be room for them."""
    config = setup.config
    budget = config.eval.max_response_tokens
    if not setup.held_out or not budget:
        return
    prompts = {"student": config.rollout.max_prompt_tokens}
    asked = {"student": setup.student}
    if setup.teacher is not None and config.eval.teacher:
        prompts["teacher"] = setup.teacher_width - config.rollout.max_response_tokens
        asked["teacher"] = setup.teacher
    for role, model in asked.items():
        room = model.max_position - prompts[role]
        if budget > room:
            raise ConfigError(
                f"eval.max_response_tokens={budget} and prompts of {prompts[role]} tokens are more than "
                f"the {role}'s {model.max_position} positions; "
                f"set --config.eval.max_response_tokens={room} or less"
            )


def _that_fit(
    setup: Setup, problems: data.Problems, field: str, *, golden: bool
) -> tuple[data.Problems, int]:
    """The problems whose prompts and golden solutions fit their budgets; the teacher's longest prompt.

    Raises DataError at the first that does not, unless data.bad_rows = "skip".
    """
    told = any("{solution}" in s.template for s in (setup.student_style, setup.teacher_style))
    alike = problems.generated and not told and not golden
    count = min(len(problems), _GENERATED_CHECKED) if alike else len(problems)
    longest = setup.config.rollout.max_prompt_tokens

    def misfits(block: list[data.Problem]) -> list[Misfit | None]:
        try:
            return fit(block)
        except ModelError as error:  # of one row's turns, or of those that the config gives to all
            if not any(problem.system or problem.history for problem in block):
                raise
            if len(block) == 1:
                return [("template refuses the turns", str(error))]
            return [misfit for problem in block for misfit in misfits([problem])]

    def fit(block: list[data.Problem]) -> list[Misfit | None]:
        nonlocal longest
        texts = setup.student_style.texts(block, setup.tokenizer)
        own = setup.tokenizer.prompt_ids(texts)
        theirs: list[list[int]] = [[]] * len(block)
        if setup.separate_prompts:
            theirs = setup.teacher_style.prompts(block, setup.teacher_tokenizer)
        found = [_misfit(setup, *ids) for ids in zip(own, theirs, strict=True)]
        if golden:
            rollout = setup.config.rollout
            found = [
                why
                or golden_misfit(
                    block[i], texts[i], len(own[i]), setup.student_style, setup.tokenizer,
                    rows=setup.student.vocab_size, width=setup.width,
                    response=rollout.max_response_tokens,
                )
                for i, why in enumerate(found)
            ]  # fmt: skip
        fitting = [len(ids) for ids, why in zip(theirs, found, strict=True) if why is None]
        longest = max([longest, *fitting])
        return found

    skip = setup.config.data.bad_rows == "skip"
    return without_misfits(problems, misfits, field=field, count=count, skip=skip), longest


def _misfit(setup: Setup, prompt: list[int], teacher_prompt: list[int]) -> Misfit | None:
    """Why a problem does not fit, by its prompts; the teacher's is empty where it reads the student's."""
    rollout = setup.config.rollout
    if misfit := prompt_misfit(len(prompt), rollout.max_prompt_tokens):
        return misfit
    readers = {"student": setup.student.vocab_size}
    if setup.terms.needs_reference:
        readers["reference"] = setup.reference.vocab_size
    if setup.teacher is not None:
        rows = {"teacher": setup.teacher.vocab_size}
        misfit = teacher_misfit(
            len(teacher_prompt), setup.teacher.max_position, rollout.max_response_tokens
        )
        misfit = misfit or unknown_id(
            teacher_prompt, setup.teacher_tokenizer, what="teacher's prompt", rows=rows
        )
        if misfit:
            return misfit
        readers |= {} if setup.separate_prompts else rows
    return unknown_id(prompt, setup.tokenizer, what="prompt", rows=readers)
