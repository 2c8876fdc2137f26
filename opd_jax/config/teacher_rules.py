"""Rules about several teachers: who teaches which rollout, and what a mixture of them does not define."""

from ml_collections import ConfigDict

from opd_jax.config import teacher_list
from opd_jax.config.loss_rules import asks_teacher
from opd_jax.config.teacher_fields import TEACHERS
from opd_jax.errors import ConfigError

_ONE = "there is one teacher: teachers.others is empty"
# Shapes of the advantage that read a probability, or the ratio of two, and no log-ratio.
_SHAPES = ("power", "skew", "f_forward", "f_jsd", "f_total_variation")
_MORE = "--config.teachers.others=NAME=PATH"


def check_teachers(config: ConfigDict) -> None:
    """Refuse teachers that nothing would read, or that could not teach. Raises ConfigError, one line."""
    section = config.teachers
    others = teacher_list.parse(section.others)
    if not others:
        for field in TEACHERS.fields[1:]:
            if section[field.name] != field.default:
                raise ConfigError(
                    f"teachers.{field.name}={section[field.name]} has no effect: {_ONE}; leave it at "
                    f"{field.default!r}, or set {_MORE}"
                )
        return
    if section.first in others:
        raise ConfigError(
            f"teachers.first={section.first} is the name of one of teachers.others={section.others}, too; "
            "give each teacher a name of its own: --config.teachers.first=NAME"
        )
    _check_routes(section, 1 + len(others))
    loss = config.loss
    if not (asks_teacher(loss) or loss.divergence_weight or loss.golden_divergence):
        raise ConfigError(
            f"teachers.others={section.others} has no effect: no term of this loss reads a teacher; set "
            "--config.teachers.others="
        )
    if config.teacher.follow != "frozen":
        raise ConfigError(
            f"teacher.follow={config.teacher.follow} with teachers.others={section.others}, wanted teachers "
            "that do not change; set --config.teacher.follow=frozen"
        )
    if config.lora.rank:
        raise ConfigError(
            f"lora.rank={config.lora.rank} with teachers.others={section.others}, wanted one of them: "
            "adapters beside several teachers are not built; set --config.lora.rank=0"
        )
    if config.scoring.compare == "spans":
        raise ConfigError(
            f"scoring.compare=spans with teachers.others={section.others}, wanted teachers that share the "
            "student's ids; set --config.scoring.compare=ids"
        )
    _check_whole_vocabulary(config)
    if not section.column:
        _check_mixture(config)


def _check_routes(section: ConfigDict, count: int) -> None:
    """Rules about the column and the weights: one of the two, and a weight for every teacher."""
    if section.column and section.weights:
        raise ConfigError(
            f"teachers.column={section.column} and teachers.weights={tuple(section.weights)}, wanted one of "
            "them: a column names the one teacher of a problem, weights mix all; set "
            "--config.teachers.weights='()' or --config.teachers.column="
        )
    if not (section.column or section.weights):
        raise ConfigError(
            f"teachers.others={section.others} with neither teachers.column nor teachers.weights, wanted one "
            "of them: the column that names each problem's teacher with --config.teachers.column=COLUMN, "
            f"or mix them with --config.teachers.weights={','.join(['1'] * count)}"
        )
    if section.weights and len(section.weights) != count:
        raise ConfigError(
            f"teachers.weights={tuple(section.weights)} has {len(section.weights)} numbers, wanted {count}: "
            "one for teacher.path and one for each of teachers.others; set "
            f"--config.teachers.weights={','.join(['1'] * count)}"
        )


def _check_whole_vocabulary(config: ConfigDict) -> None:
    """Refuse divergences over the full vocabulary: the update reads the output matrix of one teacher."""
    loss, others = config.loss, config.teachers.others
    for weight, support in (
        ("divergence_weight", "support"),
        ("golden_divergence", "golden_support"),
    ):
        if loss[weight] and loss[support] == "full":
            raise ConfigError(
                f"loss.{support}=full with teachers.others={others}, wanted a support of top_k ids: over the "
                "whole vocabulary the update would need the output matrix of every teacher; set "
                f"--config.loss.{support}=teacher"
            )


def _check_mixture(config: ConfigDict) -> None:
    """Refuse what a mean of log-ratios does not define: a distribution of the mixture, over any ids."""
    loss, section = config.loss, config.teachers
    sampled = bool(loss.pg_weight and loss.teacher_coef)
    for field, value, change in (
        ("loss.divergence_weight", loss.divergence_weight, "--config.loss.divergence_weight=0"),
        ("loss.golden_divergence", loss.golden_divergence, "--config.loss.golden_divergence=0"),
        ("loss.advantage", sampled and loss.advantage == "support" and "support",
         "--config.loss.advantage=sampled"),
        ("loss.advantage_shape", sampled and loss.advantage_shape in _SHAPES and
         loss.advantage_shape, "--config.loss.advantage_shape=log_ratio"),
        ("log.variants", config.log.variants, "--config.log.variants=0"),
    ):  # fmt: skip
        if value:
            raise ConfigError(
                f"{field}={value} with teachers.weights={tuple(section.weights)}, wanted a loss of "
                "log-ratios alone: a mixture of teachers has no probabilities (docs/teachers.md); set "
                f"{change}, or let each rollout have one teacher: --config.teachers.column=COLUMN"
            )
