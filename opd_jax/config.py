"""The config tree: every field with its default and meaning, and the rules that hold between them.

A config file (configs/) starts from `default()` and sets numbers; the command line overrides any
field (`--config.rollout.temperature=0.8`). `validate` is called once, before anything is loaded.
Values from papers quote their source in configs/recipes.py.
"""

import difflib
import json
import math
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax import guard
from opd_jax.errors import ConfigError
from opd_jax.losses import AGGREGATIONS, DIRECTIONS, ESTIMATORS

DTYPES = ("auto", "float32", "bfloat16")


def default() -> ConfigDict:
    """Every field. The text after each is its documentation."""
    config = ConfigDict()
    config.seed = 0  # of data order, rollouts and evaluation
    config.steps = 100  # rollout batches to train on

    for role in ("student", "teacher", "reference"):
        model = config[role] = ConfigDict()
        model.path = ""  # Hugging Face folder or hub name; reference: empty = the student at step 0
        model.dtype = "auto"  # compute: auto = bfloat16 on GPU, float32 on CPU
        model.rope_theta = 0.0  # base of the positions; 0 = what its config.json says
        model.max_position = 0  # longest row; 0 = what its config.json says
        model.chat_template = ""  # Jinja file; empty = the tokenizer's own
        model.enable_thinking = True  # handed to chat templates that know it (Qwen3)
    config.teacher.path = ""  # ... or "student": the same model, shown a prompt of its own
    config.teacher.follow = "frozen"  # average | live: it changes as the student does
    config.teacher.decay = 0.99  # of the moving average

    data = config.data = ConfigDict()
    data.train = "tiny:train"  # problems with golden solutions: tiny:SPLIT, .jsonl, .json, .parquet
    data.columns = ConfigDict()  # dotted paths into a row; empty = found by the names people use
    data.columns.problem = ""
    data.columns.solution = ""
    data.columns.answer = ""
    data.columns.id = ""
    data.bad_rows = "refuse"  # skip: rows that cannot be used are dropped and counted
    data.prompt_template = "{problem}"  # user's turn; {answer} and {solution} are filled in too
    data.system_prompt = ""  # system's turn; empty = the row's own, if any; none = no such turn
    data.teacher_prompt_template = "same"  # what the teacher is shown instead
    data.teacher_system_prompt = "same"
    data.shuffle = True  # global order, drawn from the seed
    data.epochs = 0.0  # passes over the data that set `steps`; 0 = `steps` says
    data.size = 20_000  # problems of the generated data set before it repeats

    rollout = config.rollout = ConfigDict()
    rollout.prompts_per_step = 16
    rollout.samples_per_prompt = 4
    rollout.max_prompt_tokens = 64
    rollout.max_response_tokens = 192
    rollout.temperature = 1.0
    rollout.top_p = 1.0
    rollout.slots = 0  # sequences decoded at one time; 0 = all of a step's
    # A row ends when its last so many tokens repeat with a short period; 0 = never, as in the papers.
    rollout.stop_on_repetition = 0
    rollout.repetition_period = 16  # the longest such period

    sample = config.sample = ConfigDict()  # the teacher's solutions, by launch/sample.py
    sample.problems = 0  # the first of data.train; 0 = all
    sample.samples = 1  # solutions a problem
    sample.batch = 64  # problems sampled, graded and written at one time
    sample.slots = 0  # sequences decoded at one time; 0 = all of a batch's
    sample.temperature = 0.7  # 2604.13016, C.1: "temperature 0.7, top-p=0.95"
    sample.top_p = 0.95
    sample.max_response_tokens = 0  # 0 = rollout.max_response_tokens
    sample.keep_wrong = False  # also solutions whose answer is wrong, or cannot be read
    sample.keep_repetitive = False  # also those that `metrics` calls repetitive

    scoring = config.scoring = ConfigDict()
    scoring.token_chunk = 2048  # tokens whose logits exist at one time
    scoring.overlap_top_k = 16  # k of the overlap metrics (2604.13016 uses 16)
    scoring.special_tokens = (
        "remap"  # ids with two meanings: remap | mask | keep (data/alignment.py)
    )
    scoring.mask_first = ()  # texts whose first occurrence in a response is not scored (2603.25562)

    loss = config.loss = ConfigDict()
    loss.pg_weight = 1.0  # w_pg of the clipped surrogate on the teacher's log-ratio
    loss.divergence_weight = 0.0  # w_div of D(student, teacher) over the full vocabulary
    loss.direction = "reverse"  # KL(student || teacher) | forward: KL(teacher || student) | jsd
    loss.jsd_beta = 0.5  # b of the generalised Jensen-Shannon divergence
    loss.lambda_gold = 0.0  # weight of the supervised loss on golden solutions
    loss.beta_kl = 0.0  # weight of KL(student || reference) on visited prefixes
    loss.kl_estimator = "full"  # full | k1 | k2 | k3
    loss.clip_low = 0.2
    loss.clip_high = 0.2
    loss.aggregation = "sequence"  # of rollouts: mean over responses of their means, or over token
    loss.gold_aggregation = "token"  # of golden solutions, likewise
    loss.truncated = "keep"  # mask: rollouts that ran out of budget are left out of the loss

    optim = config.optim = ConfigDict()
    optim.learning_rate = 1e-6
    optim.schedule = "constant"  # constant | linear | cosine, to 0 at `steps`
    optim.warmup_steps = 0  # optimizer steps, of which a rollout batch has updates_per_rollout
    optim.warmup_fraction = 0.0  # of `steps`, where warmup_steps is 0
    optim.beta1 = 0.9
    optim.beta2 = 0.999
    optim.weight_decay = 0.0
    optim.grad_clip = 1.0  # global norm
    optim.microbatch_tokens = 16_384  # tokens that go through the models at one time
    optim.updates_per_rollout = 1  # optimizer steps a rollout batch is split into
    optim.remat = False  # recompute layers in the backward pass instead of keeping activations

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every = 50  # steps; 0 = only at the end
    checkpoint.keep = 2

    evaluation = config.eval = ConfigDict()
    evaluation.every = 0  # steps between evaluations on the way; 0 = only before and after
    evaluation.data = "tiny:test"  # held-out problems, named as in data.train; empty = none
    evaluation.problems = 200
    evaluation.samples = 1  # answers a problem (k of avg@k)
    evaluation.temperature = 0.6
    evaluation.top_p = 1.0
    evaluation.teacher = True  # also measure the teacher, for the closing table
    evaluation.match = ""  # regular expression; the share of answers it is found in is reported

    metrics = config.metrics = ConfigDict()
    metrics.repetition_tail = 10_000  # L: characters of the tail that is compressed (2604.08527)
    metrics.repetition_threshold = 10.0  # tau: compression ratio above which a text repeats itself

    collapse = config.guard = ConfigDict()  # docs/guard.md
    # What is done about a collapse: off | warn: say and log it | stop: save and end | strengthen: raise
    # beta_kl and lambda_gold | mask: leave repetitive tails out of the loss | rollback: go back to the
    # checkpoint before it, and go on strengthened
    collapse.action = "off"
    collapse.false_alarm_every = 1000  # steps in which chance alone may raise one signal once
    collapse.memory = 50  # steps that "healthy" is the mean of
    collapse.patience = 20  # healthy steps that end an alarm, or take back one strengthening
    collapse.factor = 2.0  # by which an alarm multiplies beta_kl and lambda_gold
    collapse.beta_kl_floor = 0.01  # first raised value where loss.beta_kl is 0
    collapse.beta_kl_max = 1.0  # 0 = never raised
    collapse.lambda_gold_floor = 0.1  # first raised value where loss.lambda_gold is 0
    collapse.lambda_gold_max = 2.0  # 0 = never raised; else data.train needs golden solutions
    collapse.max_rollbacks = 3  # after so many the run is stopped

    log = config.log = ConfigDict()
    log.every = 1  # steps between lines of metrics.jsonl
    log.rollouts = 1  # rollouts a logged step writes to rollouts.jsonl
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Refuse impossible values and combinations, before anything is loaded.

    Raises ConfigError with one line: the field, what it is, what is wanted, the option that fixes it.
    """
    _check_names(config.to_dict(), default().to_dict(), "")
    flat = flatten(config.to_dict())
    for field in ("steps", "data.size", "rollout.prompts_per_step", "rollout.samples_per_prompt",
                  "rollout.max_prompt_tokens", "rollout.max_response_tokens", "scoring.token_chunk",
                  "scoring.overlap_top_k", "optim.microbatch_tokens", "optim.updates_per_rollout",
                  "checkpoint.keep", "eval.problems", "eval.samples", "metrics.repetition_tail",
                  "log.every", "sample.samples", "sample.batch", "rollout.repetition_period",
                  "guard.max_rollbacks"):  # fmt: skip
        _range(flat, field, 1, math.inf)
    for field in ("rollout.slots", "loss.lambda_gold", "loss.beta_kl", "loss.pg_weight",
                  "optim.warmup_steps", "optim.weight_decay", "checkpoint.every", "eval.every",
                  "rollout.temperature", "eval.temperature", "log.rollouts", "seed",
                  "loss.clip_high", "loss.divergence_weight", "data.epochs",
                  "student.rope_theta", "student.max_position",
                  "teacher.rope_theta", "teacher.max_position", "reference.rope_theta",
                  "reference.max_position", "sample.problems", "sample.slots",
                  "sample.temperature", "sample.max_response_tokens", "rollout.stop_on_repetition",
                  "guard.beta_kl_floor", "guard.beta_kl_max", "guard.lambda_gold_floor",
                  "guard.lambda_gold_max"):  # fmt: skip
        _range(flat, field, 0, math.inf)
    for field in ("rollout.top_p", "eval.top_p", "optim.beta1", "optim.beta2", "loss.clip_low",
                  "teacher.decay", "optim.warmup_fraction", "sample.top_p"):  # fmt: skip
        _range(flat, field, 0, 1)
    for field in ("optim.learning_rate", "optim.grad_clip", "metrics.repetition_threshold",
                  "rollout.top_p", "eval.top_p", "sample.top_p"):  # fmt: skip
        if not 0 < flat[field] < math.inf:
            raise _wrong(field, flat[field], "a finite number above 0")
    for field, choices in (
        ("student.dtype", DTYPES), ("teacher.dtype", DTYPES), ("reference.dtype", DTYPES),
        ("loss.kl_estimator", ESTIMATORS), ("loss.direction", DIRECTIONS), ("loss.aggregation", AGGREGATIONS),
        ("loss.gold_aggregation", AGGREGATIONS),
        ("loss.truncated", ("keep", "mask")), ("optim.schedule", ("constant", "linear", "cosine")),
        ("teacher.follow", ("frozen", "average", "live")), ("data.bad_rows", ("refuse", "skip")),
        ("scoring.special_tokens", ("remap", "mask", "keep")), ("guard.action", guard.ACTIONS),
    ):  # fmt: skip
        _choice(flat, field, choices)
    if not config.data.train:
        raise _wrong(
            "data.train", "''", "a file of problems (.jsonl, .json, .parquet), or tiny:train"
        )
    if not config.student.path:
        raise _wrong("student.path", "''", "the path of a Hugging Face folder")
    weights = ("pg_weight", "divergence_weight", "lambda_gold", "beta_kl")
    if not any(config.loss[name] for name in weights):
        raise ConfigError(
            f"loss.{', loss.'.join(weights)} are all 0, wanted one above 0: nothing would be "
            "trained; set --config.loss.pg_weight=1"
        )
    if (config.loss.pg_weight or config.loss.divergence_weight) and not config.teacher.path:
        raise _wrong(
            "teacher.path", "''",
            "a Hugging Face folder (loss.pg_weight or loss.divergence_weight is above 0)",
        )  # fmt: skip
    if not 0 < config.loss.jsd_beta < 1:
        raise _wrong("loss.jsd_beta", config.loss.jsd_beta, "a number between 0 and 1")
    if config.teacher.follow != "frozen" and config.teacher.path != "student":
        raise ConfigError(
            f"teacher.follow={config.teacher.follow} is for a teacher that is the student, got "
            f"teacher.path={config.teacher.path!r}; set --config.teacher.path=student"
        )
    for field in ("data.prompt_template", "data.teacher_prompt_template"):
        if flat[field] != "same" and "{problem}" not in flat[field]:
            raise _wrong(field, repr(flat[field]), "a text that holds {problem}")
    if flat["data.prompt_template"] == "same" or flat["data.system_prompt"] == "same":
        raise ConfigError(
            "data.prompt_template and data.system_prompt are the student's own texts, got 'same'; "
            "set --config.data.prompt_template={problem}"
        )
    if not all(isinstance(text, str) and text for text in config.scoring.mask_first):
        raise _wrong(
            "scoring.mask_first", config.scoring.mask_first, 'texts, such as ("<","think")'
        )
    if config.seed >= 2**32:
        raise _wrong("seed", config.seed, "a whole number below 2**32")
    try:
        re.compile(config.eval.match)
    except re.error as error:
        raise _wrong(
            "eval.match", repr(config.eval.match), f"a regular expression ({error})"
        ) from None
    if config.sample.temperature == 0 and config.sample.samples > 1:
        raise ConfigError(
            f"sample.samples={config.sample.samples} with sample.temperature=0 gives the same "
            "solution every time; set --config.sample.samples=1 or a temperature above 0"
        )
    if config.loss.pg_weight and config.rollout.temperature == 0:
        raise _wrong("rollout.temperature", 0, "a number above 0: greedy rollouts do not explore")
    prompts, updates = config.rollout.prompts_per_step, config.optim.updates_per_rollout
    if prompts % updates:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} does not divide into optim.updates_per_rollout="
            f"{updates} equal parts; set --config.rollout.prompts_per_step={-(-prompts // updates) * updates}"
        )
    _check_repetition(config.rollout)
    _check_guard(config)
    row = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.optim.microbatch_tokens < row:
        raise ConfigError(
            f"optim.microbatch_tokens={config.optim.microbatch_tokens} is less than one row of "
            f"{row} tokens (rollout.max_prompt_tokens + rollout.max_response_tokens); "
            f"set --config.optim.microbatch_tokens={row} or more"
        )


def _check_repetition(rollout: ConfigDict) -> None:
    last, period = rollout.stop_on_repetition, rollout.repetition_period
    if last and not period <= last < rollout.max_response_tokens:
        raise _wrong(
            "rollout.stop_on_repetition", last,
            f"0, or a number from rollout.repetition_period={period}, so that a cycle came round once, "
            f"to below rollout.max_response_tokens={rollout.max_response_tokens}",
        )  # fmt: skip


def _check_guard(config: ConfigDict) -> None:
    section, loss = config.guard, config.loss
    flat = flatten({"guard": section.to_dict()})
    _range(flat, "guard.false_alarm_every", 10, math.inf)
    _range(flat, "guard.memory", 2 * guard.LAG, math.inf)
    _range(flat, "guard.patience", guard.LAG, math.inf)
    _range(flat, "guard.factor", 1.1, math.inf)
    if section.action == "off":
        return
    if not (loss.pg_weight or loss.divergence_weight or loss.beta_kl):
        raise ConfigError(
            f"guard.action={section.action!r} watches rollouts, and this loss makes none "
            "(loss.pg_weight, loss.divergence_weight and loss.beta_kl are 0); set --config.guard.action=off"
        )
    if section.action not in ("strengthen", "rollback"):
        return
    for name in ("beta_kl", "lambda_gold"):
        first, most = loss[name] or section[f"{name}_floor"], section[f"{name}_max"]
        if most and not 0 < first <= most:
            raise _wrong(
                f"guard.{name}_max", most,
                f"0, or at least {first}, which loss.{name} or guard.{name}_floor begins with (above 0)",
            )  # fmt: skip
    if not (guard.may_raise_beta_kl(config) or guard.may_raise_lambda_gold(config)):
        raise ConfigError(
            f"guard.action={section.action!r} has nothing to raise: guard.beta_kl_max and "
            "guard.lambda_gold_max are not above loss.beta_kl and loss.lambda_gold; "
            "set --config.guard.beta_kl_max=1.0"
        )
    every, keep = config.checkpoint.every, config.checkpoint.keep
    if section.action == "rollback" and every * (keep - 1) < guard.REACH:
        wanted = -(-guard.REACH // every) + 1 if every else 2
        raise ConfigError(
            f"guard.action='rollback' wants a checkpoint that is {guard.REACH} steps old, got "
            f"checkpoint.keep={keep} of checkpoint.every={every} steps; set --config.checkpoint.keep={wanted}"
            + ("" if every else f" --config.checkpoint.every={guard.REACH}")
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"rollout.top_p": 1.0, ...} of a nested dict."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """Every field, resolved, as the text of config.json."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def near(name: str, known: list[str]) -> str:
    """The known name nearest to a misspelt one, or the list of all."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def explain(
    error: Exception, arguments: list[str], fields: ConfigDict | None = None
) -> ConfigError:
    """One line of ours for what ml_collections raises about a `--config` file or override.

    `fields` is the tree that the file starts from; None = the training config's.
    """
    known = flatten((fields or default()).to_dict())
    for argument in arguments:
        match = re.match(r"--?config\.([\w.]+)(?:=(.*))?$", argument)
        if match and match[1] not in known:
            return ConfigError(f"config.{match[1]} is not a field; {near(match[1], list(known))}")
        if match and match[2] is not None and not _parses(match[2], known[match[1]]):
            kind = type(known[match[1]]).__name__
            return ConfigError(
                f"config.{match[1]}={match[2]!r}, wanted a value of type {kind}, "
                f"such as {known[match[1]]!r}"
            )
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if "opd_jax.errors." in last:  # raised inside the config file; it comes to us as a traceback
        return ConfigError(last.partition("Error: ")[2])
    return ConfigError(f"--config cannot be read: {last.strip()}")


def _parses(text: str, example: Any) -> bool:
    if isinstance(example, bool):
        return text.lower() in ("true", "false", "1", "0", "t", "f")
    if isinstance(example, tuple):
        return True  # any text is a tuple of one
    try:
        type(example)(text)
    except ValueError:
        return False
    return True


def _check_names(got: dict, known: dict, prefix: str) -> None:
    for name, value in got.items():
        if name not in known:
            raise ConfigError(f"config.{prefix}{name} is not a field; {near(name, list(known))}")
        if isinstance(known[name], dict) != isinstance(value, dict):
            raise ConfigError(
                f"config.{prefix}{name} is {value!r}, wanted the kind of {known[name]!r}"
            )
        if isinstance(value, dict):
            _check_names(value, known[name], f"{prefix}{name}.")
    for name in known:
        if name not in got:
            raise ConfigError(
                f"config.{prefix}{name} is missing; start from opd_jax.config.default()"
            )


def _wrong(field: str, got: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{field}={got}, wanted {wanted}; set --config.{field}=...")


def _range(flat: dict[str, Any], field: str, low: float, high: float) -> None:
    value = flat[field]
    whole = isinstance(flatten(default().to_dict())[field], int)
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise _wrong(field, value, f"a {'whole ' if whole else ''}number, {wanted}")
    if value == math.inf:
        raise _wrong(field, value, "a finite number")


def _choice(flat: dict[str, Any], field: str, choices: tuple[str, ...]) -> None:
    if flat[field] not in choices:
        hint = difflib.get_close_matches(str(flat[field]), choices, n=1) or choices[:1]
        raise ConfigError(
            f"{field}={flat[field]!r}, wanted one of {', '.join(choices)}; "
            f"set --config.{field}={hint[0]}"
        )
