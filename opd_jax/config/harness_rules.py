"""Rules about the harness: a stage whose text is shown, and read by a term of the loss."""

from ml_collections import ConfigDict

from opd_jax.config.harness_fields import HARNESS
from opd_jax.config.loss_rules import asks_teacher
from opd_jax.config.rules import shows
from opd_jax.errors import ConfigError


def check_harness(config: ConfigDict) -> None:
    """Refuse a harness whose text nothing would read, or others would. Raises ConfigError, one line."""
    section, loss = config.harness, config.loss
    if not section.prompt:
        for field in HARNESS.fields[1:]:
            if section[field.name] != field.default:
                raise ConfigError(
                    f"harness.{field.name}={section[field.name]} has no effect: harness.prompt is empty; "
                    f"leave it at {field.default}, or set --config.harness.prompt=TEXT"
                )
        return
    shown = f"{{{section.field}}}"
    if not shows(config.data.teacher_prompt_template, section.field):
        raise ConfigError(
            f"harness.prompt has no effect: data.teacher_prompt_template does not show {shown}, which the "
            f"student writes; add {shown} to it, or set --config.harness.prompt="
        )
    for name, text in (("data.prompt_template", config.data.prompt_template),
                       ("harness.prompt", section.prompt)):  # fmt: skip
        if shows(text, section.field):
            raise ConfigError(
                f"{name} shows {shown}, which the student writes for the teacher's prompt alone; remove it, "
                "or give that text another name: --config.harness.field=NAME"
            )
    if not (asks_teacher(loss) or loss.divergence_weight):
        raise ConfigError(
            "harness.prompt has no effect: no term of this loss on rollouts reads the teacher; set "
            "--config.harness.prompt="
        )
    if config.eval.data and config.eval.teacher:
        raise ConfigError(
            "eval.teacher=True with harness.prompt, wanted False: the teacher's prompts of held-out problems "
            f"have no {shown}; set --config.eval.teacher=False"
        )
