"""Rules between fields: what is impossible together, would be ignored or could not work, in one line.

What a field may be on its own stands in its record (fields.py) and is checked by schema.check, which
every `validate` here begins with. They are called once, before anything is loaded.
"""

from ml_collections import ConfigDict

from opd_jax.config import guard_limits
from opd_jax.config.fields import FIELDS
from opd_jax.config.harness_rules import check_harness
from opd_jax.config.loss_rules import check_gates, check_loss
from opd_jax.config.schema import check, wrong
from opd_jax.config.teacher_rules import check_teachers
from opd_jax.config.trees import EVALUATION, SAMPLING, TRAINING
from opd_jax.errors import ConfigError


def validate(config: ConfigDict) -> None:
    """Refuse what training cannot work with, before anything is loaded.

    Raises ConfigError with one line: the field, what it is, what is wanted, the option that fixes it.
    """
    check(config, TRAINING)
    _check_problems(config)
    if config.eval.best and not config.eval.data:
        raise ConfigError(
            f"eval.best={config.eval.best} needs evaluations, got eval.data=''; name held-out problems: "
            "--config.eval.data=FILE, or set --config.eval.best="
        )
    if config.eval.best == "matched" and not config.eval.match:
        raise wrong("eval.match", "''", "a regular expression, for eval.best=matched")
    weights = ("pg_weight", "divergence_weight", "lambda_gold", "golden_divergence", "beta_kl")
    if not any(config.loss[name] for name in weights):
        raise ConfigError(
            f"loss.{', loss.'.join(weights)} are all 0, wanted one above 0: nothing would be "
            "trained; set --config.loss.pg_weight=1"
        )
    check_loss(config)
    check_gates(config)
    check_teachers(config)
    check_harness(config)
    _check_variants(config)
    _check_reward(config)
    if config.replay.path:
        check_replayable(config, f"replay.path={config.replay.path}")
    elif config.replay.other_student:
        raise ConfigError(
            "replay.other_student=True has no effect: there is no replay.path; set "
            "--config.replay.other_student=False, or --config.replay.path=FOLDER"
        )
    if config.loss.pg_weight and config.rollout.temperature == 0:
        raise wrong("rollout.temperature", 0, "a number above 0: greedy rollouts do not explore")
    prompts, updates = config.rollout.prompts_per_step, config.optim.updates_per_rollout
    if prompts % updates:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} does not divide into optim.updates_per_rollout="
            f"{updates} equal parts; set --config.rollout.prompts_per_step={-(-prompts // updates) * updates}"
        )
    _check_repetition(config.rollout)
    _check_horizon(config)
    _check_jump(config)
    _check_guard(config)
    row = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.optim.microbatch_tokens < row:
        raise ConfigError(
            f"optim.microbatch_tokens={config.optim.microbatch_tokens} is less than one row of "
            f"{row} tokens (rollout.max_prompt_tokens + rollout.max_response_tokens); "
            f"set --config.optim.microbatch_tokens={row} or more"
        )


def validate_sampling(config: ConfigDict) -> None:
    """Refuse what launch/sample.py cannot work with. Raises ConfigError as `validate` does."""
    check(config, SAMPLING)
    _check_problems(config)
    if config.sample.temperature == 0 and config.sample.samples > 1:
        raise ConfigError(
            f"sample.samples={config.sample.samples} with sample.temperature=0 gives the same "
            "solution every time; set --config.sample.samples=1 or a temperature above 0"
        )
    _check_choice(config.sample)


def _check_choice(section: ConfigDict) -> None:
    """Rules about the choice of one solution of several."""
    if section.choose == "all" and (section.hint or section.choose_top_k != 16):
        field, usual = ("hint", "''") if section.hint else ("choose_top_k", 16)
        raise ConfigError(
            f"sample.{field}={section[field]} has no effect: sample.choose=all; leave it at {usual}, or "
            "set --config.sample.choose=overlap"
        )
    if section.choose == "likelihood" and section.choose_top_k != 16:
        raise ConfigError(
            f"sample.choose_top_k={section.choose_top_k} has no effect: sample.choose=likelihood; leave it "
            "at 16, or set --config.sample.choose=overlap"
        )
    if section.choose != "all" and section.samples < 2 and not section.hint:
        raise ConfigError(
            f"sample.samples={section.samples} with sample.choose={section.choose}, wanted 2 or more: there "
            "is nothing to choose from; set --config.sample.samples=4"
        )
    if section.hint and "{answer}" not in section.hint:
        raise wrong("sample.hint", repr(section.hint), "a template with {answer}, or nothing")


def validate_evaluation(config: ConfigDict) -> None:
    """Refuse what launch/evaluate.py cannot work with. Raises ConfigError as `validate` does."""
    check(config, EVALUATION, EVALUATION)
    for told in ("{answer}", "{solution}"):
        if told in config.data.prompt_template:
            raise wrong(
                "data.prompt_template", repr(config.data.prompt_template),
                f"a text without {told}: it would tell the model what it is asked for",
            )  # fmt: skip
    if config.eval.temperature == 0 and config.eval.samples > 1:
        raise ConfigError(
            f"eval.samples={config.eval.samples} with eval.temperature=0 gives the same answer every "
            "time; set --config.eval.samples=1 or a temperature above 0"
        )


def _check_problems(config: ConfigDict) -> None:
    """Rules about the models and how problems are shown to them."""
    if config.teacher.get("follow", "frozen") != "frozen" and config.teacher.path != "student":
        raise ConfigError(
            f"teacher.follow={config.teacher.follow} is for a teacher that is the student, got "
            f"teacher.path={config.teacher.path!r}; set --config.teacher.path=student"
        )
    usual = FIELDS["teacher.every"].default
    copies = config.teacher.get("follow", "frozen") == "every"
    if not copies and (every := config.teacher.get("every", usual)) != usual:
        raise ConfigError(
            f"teacher.every={every} has no effect: teacher.follow={config.teacher.follow}; "
            f"leave it at {usual}, or set --config.teacher.follow=every"
        )
    if config.data.prompt_template == "same" or config.data.system_prompt == "same":
        raise ConfigError(
            "data.prompt_template and data.system_prompt are the student's own texts, got 'same'; "
            "set --config.data.prompt_template={problem}"
        )


def _check_variants(config: ConfigDict) -> None:
    loss, every = config.loss, config.log.variants
    sampled = loss.pg_weight and loss.teacher_coef and loss.advantage == "sampled"
    if every and not sampled:
        raise ConfigError(
            f"log.variants={every} compares the teacher's advantages of sampled tokens, got loss.pg_weight="
            f"{loss.pg_weight:g}, loss.teacher_coef={loss.teacher_coef:g} and loss.advantage="
            f"{loss.advantage}, wanted both numbers above 0 and sampled; set --config.log.variants=0"
        )


def _check_reward(config: ConfigDict) -> None:
    """Rules about a reward from outside: one source, and a use for it."""
    reward, loss = config.reward, config.loss
    if reward.function and reward.column:
        raise ConfigError(
            f"reward.function={reward.function} and reward.column={reward.column}, wanted one source of the "
            "reward; set --config.reward.column= or --config.reward.function="
        )
    if not reward.function:
        for name in ("seconds", "processes", "on_error"):
            if reward[name] != (usual := FIELDS[f"reward.{name}"].default):
                raise ConfigError(
                    f"reward.{name}={reward[name]} has no effect: there is no reward.function; leave it at "
                    f"{usual}, or set --config.reward.function=MODULE:FUNCTION"
                )
    source = next((name for name in ("function", "column") if reward[name]), "")
    if source and not (loss.pg_weight or loss.divergence_weight or loss.beta_kl):
        raise ConfigError(
            f"reward.{source}={reward[source]} has no effect: this loss makes no rollouts (loss.pg_weight, "
            f"loss.divergence_weight and loss.beta_kl are 0); set --config.reward.{source}="
        )
    if not reward.column:
        return
    compares = bool(loss.pg_weight and loss.group_coef) or loss.outcome == "margin"
    if compares or loss.rollout_gate == "agreement":
        raise ConfigError(
            f"reward.column={reward.column} gives every rollout of a problem the same reward, and "
            "loss.group_coef, loss.outcome=margin and loss.rollout_gate=agreement compare the rollouts of a "
            "problem, so the reward would teach nothing; set --config.reward.function=MODULE:FUNCTION, or "
            "use the column with --config.loss.group_coef=0 --config.loss.outcome=none "
            "--config.loss.rollout_gate=correct"
        )
    if loss.rollout_gate != "correct" and loss.outcome == "none":
        raise ConfigError(
            f"reward.column={reward.column} has no effect: no term of this loss reads a reward; set "
            "--config.loss.rollout_gate=correct, which leaves out the problems below "
            "loss.rollout_gate_reward, or --config.reward.column="
        )


def check_replayable(config: ConfigDict, what: str) -> None:
    """Refuse a loss that needs more of the teacher, or of fresh rollouts, than a recording has.

    `what` begins the line. Raises ConfigError: the field, what a recording has instead, the fix.
    """
    loss, teacher = config.loss, config.teacher.follow
    divergence = bool(loss.divergence_weight)
    by_teacher = bool(loss.pg_weight and loss.teacher_coef)
    faults = (
        (not (loss.pg_weight or divergence or loss.beta_kl), "a loss without rollouts",
         "loss.pg_weight=1"),
        (divergence and loss.support != "teacher",
         f"loss.support={loss.support}, and has the teacher's own top-k ids alone",
         "loss.support=teacher"),
        (by_teacher and loss.advantage == "support",
         "loss.advantage=support, which needs the current student's log-probs of recorded ids",
         "loss.advantage=sampled"),
        (by_teacher and loss.advantage_shape == "baseline",
         "loss.advantage_shape=baseline, which needs the exact reverse KL",
         "loss.advantage_shape=log_ratio"),
        (by_teacher and loss.extrapolation != 1,
         f"loss.extrapolation={loss.extrapolation:g}, which scores with the reference",
         "loss.extrapolation=1"),
        (loss.token_weight in ("prune", "tip", "ta", "selectkd"),
         f"loss.token_weight={loss.token_weight}, which needs both models' distributions",
         "loss.token_weight=none"),
        (teacher != "frozen", f"teacher.follow={teacher}, a teacher that changes",
         "teacher.follow=frozen"),
        (config.teachers.others, f"teachers.others={config.teachers.others}, more than the one teacher of "
         "a recording", "teachers.others="),
        (config.harness.prompt, "harness.prompt, a prompt of the teacher that the current student writes",
         "harness.prompt="),
        (config.guard.action != "off",
         f"guard.action={config.guard.action}, which watches rollouts of the current student",
         "guard.action=off"),
        (config.log.variants, f"log.variants={config.log.variants}, which needs the exact reverse KL",
         "log.variants=0"),
        (loss.golden_divergence,
         f"loss.golden_divergence={loss.golden_divergence:g}, which scores golden solutions with the teacher",
         "loss.golden_divergence=0"),
        (loss.low_kl_window,
         f"loss.low_kl_window={loss.low_kl_window}, which needs the exact reverse KL",
         "loss.low_kl_window=0"),
        (config.rollout.horizon,
         f"rollout.horizon={tuple(config.rollout.horizon)}, which bounds responses while they are sampled",
         "rollout.horizon='()'"),
        (config.jump.problems,
         f"jump.problems={config.jump.problems}, which samples answers of the current student",
         "jump.problems=0"),
        (config.guard.self_test == "always",
         "guard.self_test=always, which compares the sampler with the scorer", "guard.self_test=off"),
    )  # fmt: skip
    for wrong_here, got, fix in faults:
        if wrong_here:
            raise ConfigError(f"{what} cannot be used with {got}; set --config.{fix}")


def _check_repetition(rollout: ConfigDict) -> None:
    last, period = rollout.stop_on_repetition, rollout.repetition_period
    if last and not period <= last < rollout.max_response_tokens:
        raise wrong(
            "rollout.stop_on_repetition", last,
            f"0, or a number from rollout.repetition_period={period}, so that a cycle came round once, "
            f"to below rollout.max_response_tokens={rollout.max_response_tokens}",
        )  # fmt: skip


def _check_horizon(config: ConfigDict) -> None:
    """Rules about budgets that grow: a horizon needs rollouts, rows that hold it, and tokens that count."""
    rollout, loss = config.rollout, config.loss
    if not rollout.horizon:
        for name in ("horizon_steps", "horizon_entropy"):
            if rollout[name] != (usual := FIELDS[f"rollout.{name}"].default):
                raise ConfigError(
                    f"rollout.{name}={rollout[name]} has no effect: rollout.horizon is empty; leave it at "
                    f"{usual}, or set --config.rollout.horizon=64,128"
                )
        return
    if (longest := max(rollout.horizon)) > rollout.max_response_tokens:
        raise ConfigError(
            f"rollout.horizon={tuple(rollout.horizon)} goes beyond rollout.max_response_tokens="
            f"{rollout.max_response_tokens}, the budget that it rises to; set "
            f"--config.rollout.max_response_tokens={longest} or shorten the horizon"
        )
    if not (loss.pg_weight or loss.divergence_weight or loss.beta_kl):
        raise ConfigError(
            f"rollout.horizon={tuple(rollout.horizon)} bounds rollouts, and this loss makes none "
            "(loss.pg_weight, loss.divergence_weight and loss.beta_kl are 0); "
            "set --config.rollout.horizon='()'"
        )
    if loss.truncated == "mask":
        raise ConfigError(
            f"loss.truncated=mask with rollout.horizon={tuple(rollout.horizon)} leaves out every rollout "
            "that the horizon cuts, so that its stairs would teach next to nothing; set "
            "--config.loss.truncated=keep"
        )


def _check_jump(config: ConfigDict) -> None:
    """Rules about jumps, whose problems are answered by the programs of rollouts."""
    loss, section, usual = config.loss, config.jump, FIELDS["jump.candidates"].default
    if not section.problems and section.candidates != usual:
        raise ConfigError(
            f"jump.candidates={section.candidates} has no effect: jump.problems=0; leave it at {usual}, or "
            "set --config.jump.problems=50"
        )
    if section.problems and not (loss.pg_weight or loss.divergence_weight or loss.beta_kl):
        raise ConfigError(
            f"jump.problems={section.problems} with a loss that makes no rollouts (loss.pg_weight, "
            "loss.divergence_weight and loss.beta_kl are 0), wanted one that does: answers to these problems "
            "are sampled like rollouts; set --config.jump.problems=0"
        )


def _check_guard(config: ConfigDict) -> None:
    section, loss = config.guard, config.loss
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
            raise wrong(
                f"guard.{name}_max", most,
                f"0, or at least {first}, which loss.{name} or guard.{name}_floor begins with (above 0)",
            )  # fmt: skip
    if not (guard_limits.may_raise_beta_kl(config) or guard_limits.may_raise_lambda_gold(config)):
        raise ConfigError(
            f"guard.action={section.action!r} has nothing to raise: guard.beta_kl_max and "
            "guard.lambda_gold_max are not above loss.beta_kl and loss.lambda_gold; "
            "set --config.guard.beta_kl_max=1.0"
        )
    every, keep = config.checkpoint.every, config.checkpoint.keep
    if section.action == "rollback" and every * (keep - 1) < guard_limits.REACH:
        wanted = -(-guard_limits.REACH // every) + 1 if every else 2
        raise ConfigError(
            f"guard.action='rollback' wants a checkpoint that is {guard_limits.REACH} steps old, got "
            f"checkpoint.keep={keep} of checkpoint.every={every} steps; set --config.checkpoint.keep={wanted}"
            + ("" if every else f" --config.checkpoint.every={guard_limits.REACH}")
        )
