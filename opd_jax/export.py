"""A trained student as a Hugging Face folder: weights of a checkpoint, everything else of its source."""

import json
import pathlib
from typing import Any

from opd_jax import checkpoint, data, models
from opd_jax.errors import ConfigError, WorkdirError
from opd_jax.models import decoder
from opd_jax.setup import with_ends

DTYPES = ("float32", "bfloat16", "float16")


def export(workdir: str, out: str, *, step: int | None = None, dtype: str = "float32") -> int:
    """Write the student of a run as the folder `out`, which transformers loads; returns its step.

    Only the parameters are read from the checkpoint. Tokenizer, chat template, generation settings
    and the rest of config.json come from the folder that the run started from (`student.path`), the
    chat template from `student.chat_template` where the run had one. The template's end of turn, with
    which the student learned to end, is among the exported end tokens.

    Args:
      workdir: folder of a run, finished or not.
      out: a new or empty folder.
      step: of the checkpoint; None for the newest.
      dtype: of the weights, one of DTYPES.

    Raises an OpdError, and writes nothing: no such workdir or checkpoint, `out` is not empty, the
    source folder is gone.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype={dtype!r}, wanted one of {', '.join(DTYPES)}; set --dtype=float32"
        )
    models.check_free(out)
    student = _student(pathlib.Path(workdir))
    source = student["path"]
    config = models.load_config(
        source,
        rope_theta=student.get("rope_theta", 0.0),  # runs from before these fields lack them
        max_position=student.get("max_position", 0),
    )
    step, params = checkpoint.restore_params(
        pathlib.Path(workdir), decoder.abstract_params(config), step=step
    )
    template = student.get("chat_template", "")
    tokenizer = data.Tokenizer(source, chat_template=template)
    models.save(out, with_ends(config, tokenizer), params, source=source, dtype=dtype)
    if template:  # the template that the run used, in place of the folder's own
        file = pathlib.Path(out) / "chat_template.jinja"
        file.write_text(tokenizer.hf.chat_template, encoding="utf-8")
    return step


def _student(workdir: pathlib.Path) -> dict[str, Any]:
    """Section `student` of the run's config.json."""
    if not workdir.is_dir():
        raise WorkdirError(
            f"workdir {str(workdir)!r} does not exist; give the folder that train.py printed first"
        )
    file = workdir / "config.json"
    if not file.is_file():
        raise WorkdirError(
            f"workdir {str(workdir)!r} holds no config.json, so it is not a run; "
            "give the folder that train.py printed first"
        )
    try:
        student = json.loads(file.read_text(encoding="utf-8"))["student"]
        if not isinstance(student["path"], str):
            raise TypeError("student.path is not text")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise WorkdirError(
            f"{file} cannot be read as the config of a run ({error}); "
            "restore it, or give another workdir"
        ) from error
    return student
