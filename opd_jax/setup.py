"""What is known of a run before its weights are loaded: everything that can be refused, refused here."""

import dataclasses

from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import data, models, objectives
from opd_jax.errors import ConfigError, ModelError

_PROMPTS_CHECKED = 256  # of the training data, up front; the rest is checked as it comes


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked config and what follows from it.

    Attributes:
      student, teacher: architectures; teacher is None where no term needs one.
      reference_path: folder of the reference, by default the student's own.
      stop_ids: the end tokens of student and teacher together.
      vocabulary: logits are cut to the first `vocabulary` ids, those the models share.
      width: tokens of a whole row, prompt and response.
      problems, prompts: the held-out problems and their prompts as ids.
    """

    config: ConfigDict
    terms: objectives.Terms
    student: models.ModelConfig
    teacher: models.ModelConfig | None
    reference_path: str
    tokenizer: data.Tokenizer
    stop_ids: tuple[int, ...]
    vocabulary: int
    width: int
    problems: list[data.Problem]
    prompts: list[list[int]]


def make_setup(config: ConfigDict) -> Setup:
    """Read and check all but the weights. Raises an OpdError; writes and compiles nothing."""
    configuration.validate(config)
    terms = make_terms(config)
    student = models.load_config(config.student.path)
    tokenizer = data.Tokenizer(config.student.path)
    vocabulary = min(tokenizer.size, student.vocab_size)
    stop_ids = student.eos_token_ids
    teacher = None
    if terms.pg_weight:
        teacher = models.load_config(config.teacher.path)
        _require_same_tokens(tokenizer, data.Tokenizer(config.teacher.path))
        vocabulary = min(vocabulary, teacher.vocab_size)
        stop_ids = tuple(dict.fromkeys(stop_ids + teacher.eos_token_ids))
    reference_path = config.reference.path or config.student.path
    if terms.beta_kl and models.load_config(reference_path).vocab_size < vocabulary:
        raise ModelError(
            f"{reference_path}: the reference has fewer than the student's {vocabulary} ids; "
            "set --config.reference.path to a model with the student's tokenizer"
        )
    if not student.eos_token_ids:
        raise ModelError(
            f"{config.student.path}: no eos_token_id in config.json or generation_config.json, "
            "wanted at least one end token; add it to generation_config.json"
        )
    if config.scoring.overlap_top_k > vocabulary:
        raise ConfigError(
            f"scoring.overlap_top_k={config.scoring.overlap_top_k} is more than the {vocabulary} "
            f"ids that the models share; set --config.scoring.overlap_top_k={vocabulary}"
        )
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and width > model.max_position:
            room = max(model.max_position - config.rollout.max_prompt_tokens, 1)
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {width} is more than "
                f"the {role}'s {model.max_position} positions; "
                f"set --config.rollout.max_response_tokens={room} or less"
            )
    problems, prompts = _prompts(config, tokenizer)
    return Setup(
        config=config,
        terms=terms,
        student=student,
        teacher=teacher,
        reference_path=reference_path,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        vocabulary=vocabulary,
        width=width,
        problems=problems,
        prompts=prompts,
    )


def make_terms(config: ConfigDict) -> objectives.Terms:
    """The loss's numbers from the config section `loss`."""
    names = [field.name for field in dataclasses.fields(objectives.Terms)]
    return objectives.Terms(**{name: config.loss[name] for name in names})


def _prompts(
    config: ConfigDict, tokenizer: data.Tokenizer
) -> tuple[list[data.Problem], list[list[int]]]:
    """The held-out problems with their prompts; the first training prompts are checked on the way."""
    limit = config.rollout.max_prompt_tokens
    train = data.split_of(config.data.train, field="data.train")
    for i in range(min(config.data.size, _PROMPTS_CHECKED)):
        data.prompt_ids(data.problem(train, i), tokenizer, config.data, limit)
    held_out = data.split_of(config.eval.data, field="eval.data")
    problems = [data.problem(held_out, i) for i in range(config.eval.problems)]
    return problems, [data.prompt_ids(p, tokenizer, config.data, limit) for p in problems]


def _require_same_tokens(student: data.Tokenizer, teacher: data.Tokenizer) -> None:
    mine, theirs = student.vocabulary(), teacher.vocabulary()
    if mine != theirs:
        differing = [t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)]
        example = min(differing)
        raise ModelError(
            f"the tokenizers of {student.path} and {teacher.path} differ in {len(differing)} tokens "
            f"(such as {example!r}: id {mine.get(example)} and {theirs.get(example)}); "
            "use a student and a teacher of one tokenizer family"
        )
