"""Export a trained student as a Hugging Face folder: weights of a checkpoint, the rest from its source."""

import pathlib
from typing import Any

from opd_jax import data, models
from opd_jax.checkpoint.student import restore_adapters, restore_student
from opd_jax.errors import ConfigError
from opd_jax.models import hf_adapters
from opd_jax.training.roles import with_ends
from opd_jax.workdir import atomic
from opd_jax.workdir.folder import read_config

DTYPES = ("float32", "bfloat16", "float16")


def export(workdir: str, out: str, *, step: int | None = None, dtype: str = "float32") -> int:
    """Write the student of a run as the folder `out`, which transformers loads; return its step.

    Adapters are merged into their base; otherwise only the parameters are read from the checkpoint.
    Tokenizer, chat template, generation settings and the rest of config.json come from the folder that the
    run started from (`student.path`), the chat template from `student.chat_template` where the run had
    one. The template's end of turn, with which the student learned to end, is among the exported end tokens.

    Args:
      workdir: folder of a run, finished or not.
      out: a new or empty folder.
      step: step of the checkpoint; None for the newest.
      dtype: dtype of the exported weights, one of DTYPES.

    Raises an OpdError, and writes nothing, where the workdir or checkpoint does not exist, `out` is not
    empty, or the source folder no longer exists.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}; set --dtype=float32")
    models.check_free(out)
    student, config = _student(workdir)
    source = student["path"]
    step, params = restore_student(pathlib.Path(workdir), config, step=step)
    template = student.get("chat_template", "")
    tokenizer = data.Tokenizer(source, chat_template=template)
    models.save(out, with_ends(config, tokenizer), params, source=source, dtype=dtype)
    if template:  # the template that the run used, in place of the folder's own
        atomic.write_text(pathlib.Path(out) / "chat_template.jinja", tokenizer.hf.chat_template)
    return step


def export_adapters(workdir: str, out: str, *, step: int | None = None) -> int:
    """Write the adapters of a run as the folder `out`, which PEFT and vLLM load beside their base.

    Returns their step. The arguments and errors are those of `export`; a run without adapters is refused.
    """
    models.check_free(out)
    student, config = _student(workdir)
    found = restore_adapters(pathlib.Path(workdir), config, step=step)
    if found is None:
        raise ConfigError(
            f"workdir {workdir!r} trained all weights (lora.rank=0), so there are no adapters; leave "
            "--adapters out"
        )
    hf_adapters.save(
        out, found.params, found.low_rank, source=student["path"], base=found.base_hash
    )
    return found.step


def _student(workdir: str) -> tuple[dict[str, Any], models.ModelConfig]:
    """Return the section `student` of a run's config.json, and the architecture at its path."""
    student: dict[str, Any] = read_config(pathlib.Path(workdir))["student"]
    config = models.load_config(
        student["path"],
        rope_theta=student.get("rope_theta", 0.0),  # configs of old runs lack these fields
        max_position=student.get("max_position", 0),
    )
    return student, config
