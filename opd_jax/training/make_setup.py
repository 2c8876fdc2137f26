"""Read and check everything about a run before its weights are loaded."""

import datetime

import jax
from ml_collections import ConfigDict

from opd_jax import data, hardware, host_memory, models
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError, ModelError
from opd_jax.models import attention
from opd_jax.sharding.mesh import Mesh, make_mesh
from opd_jax.training import model_limits
from opd_jax.training.fitting import with_data
from opd_jax.training.other_teachers import OtherTeacher, describe, locate_others, open_others
from opd_jax.training.replay import check_problems, check_rewards, open_replay
from opd_jax.training.roles import (
    architecture,
    ask_for_full_products,
    golden_end,
    harness_style,
    open_model,
    prompt_styles,
    reference_end_ids,
    resolved,
    same_prompts,
)
from opd_jax.training.setup import Setup
from opd_jax.training.terms import Terms, make_terms, warnings

_SPANS_CHECKED = 128  # texts in which spans are counted


def make_setup(config: ConfigDict, mesh: Mesh | None = None) -> Setup:
    """Read and check everything but the weights; write and compile nothing.

    `mesh` replaces the devices of the config. Raises an OpdError for any input that cannot be used.
    """
    validate(config)
    hardware.require_supported(jax.default_backend())
    terms = make_terms(config)
    mesh = mesh or make_mesh(config.mesh)
    attention.choose(config.mesh.attention)
    config = resolved(
        config,
        ["student"] + terms.needs_teacher * ["teacher"] + terms.needs_reference * ["reference"],
    )
    locate_others(config)
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
    others: list[OtherTeacher] = []
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
        others = open_others(
            config, today, student=vocabularies[0], first=vocabularies[1], alignment=alignment,
            reference_ends=reference_ends,
        )  # fmt: skip
        notes += describe(config)
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
    for other in others:
        folders.setdefault(other.path, (f"teacher {other.name}", other.model))
        model_limits.check_rollouts(config, terms, student, other.model, reference, alignment)
        mesh.check("teacher", other.model)
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
    if config.harness.prompt:
        notes.append(
            f"harness: before the rollouts of a step the student writes {{{config.harness.field}}} of the "
            f"teacher's prompts, {config.harness.max_tokens} tokens at most"
        )
    notes += host_memory.lines()
    if terms.needs_reference and reference.vocab_size < alignment.vocabulary:
        raise ModelError(
            f"{reference_section.path}: the reference has {reference.vocab_size} ids, fewer than the "
            f"student's {alignment.vocabulary}; set --config.reference.path to a model with the "
            "student's tokenizer"
        )
    styles = prompt_styles(config.data)
    writing = harness_style(config)
    asking = (*styles, *([writing] if writing else []))
    columns = dict.fromkeys(name for style in asking for name in style.columns)
    if writing is not None:
        columns.pop(config.harness.field)  # the student writes it
    shows_answer = any("{answer}" in style.template for style in asking)
    needs_solution = terms.needs_golden or any("{solution}" in s.template for s in asking)
    by_verdict = not (config.reward.function or config.reward.column)
    train = data.open_problems(
        config.data.train, field="data.train", columns=config.data.columns, size=config.data.size,
        need_solution=needs_solution,
        need_answer=shows_answer or (terms.needs_reward and by_verdict) or bool(config.jump.problems),
        bad_rows=config.data.bad_rows, shown=tuple(columns),
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
        others=tuple(others),
        harness_style=writing,
    )
    setup = with_data(setup, train, held_out)
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
    lines = data.spans_report(
        setup.alignment,
        reader,
        student,
        teacher,
        texts,
        source=f"{len(texts)} {what} of data.train",
    )
    if setup.terms.divergence_weight:
        assert setup.alignment.shared is not None
        lines.append(
            f"  loss.span_events={setup.terms.span_events}: {setup.alignment.shared.shape[1]:,} ids of one "
            "text in both vocabularies"
        )
    return lines


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
