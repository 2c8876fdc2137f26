"""The models of a planned run: their architectures, and which of them share weights."""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict

from opd_jax import hardware, models
from opd_jax.errors import ModelError
from opd_jax.hardware import Device
from opd_jax.models import ModelConfig, catalog

_OF_ONE_FAMILY = 1_000  # ids by which vocabularies of one tokenizer family differ at most
_ALL = 10**9  # held-out problems where all are measured: the plan opens no file


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the models' folders, the tokenizers and the problems decide; the config decides the rest.

    Attributes are those of `Workload`, and `problems`: how many an evaluation asks, and `others`: paths and
    architectures of further teachers.
    """

    student: ModelConfig
    teacher: ModelConfig | None
    reference: ModelConfig | None
    vocabulary: int
    teacher_width: int
    renumbered: bool
    problems: int
    teacher_vocabulary: int = 0
    others: tuple[tuple[str, ModelConfig], ...] = ()


def base_roles_of(config: ConfigDict, roles: Roles, device: Device) -> tuple[str, ...]:
    """Return the roles whose weights are the student's frozen ones, in its dtype and its layout."""
    student, found = config.student, []
    own = student.path, itemsize_of(student.dtype, device), config.mesh.student
    for role in ("teacher", "reference"):
        section = config[role]
        path = student.path if section.path in ("", "student") else section.path
        same = (path, itemsize_of(section.dtype, device), config.mesh[role]) == own
        live = role == "teacher" and section.follow != "frozen"
        if getattr(roles, role) is not None and same and not live:
            found.append(role)
    return tuple(found)


def architecture_of(section: Any) -> tuple[ModelConfig, int]:
    """A role's architecture and the ids of its tokenizer; of a folder, or as published."""
    changes = {"rope_theta": section.rope_theta, "max_position": section.max_position}
    if os.path.isdir(section.path):
        model = models.load_config(section.path, **changes)
        return model, model.vocab_size
    found = catalog.find(section.path, **changes)
    if found is None:
        raise ModelError(
            f"the architecture of {section.path!r} is not known here: it is no folder and not one of "
            f"{', '.join(catalog.names())}; give the folder of its config.json"
        )
    return found.model, found.tokens


def itemsize_of(dtype: str, device: Device) -> int:
    """Bytes of a weight in the dtype that a role's field names, on this device."""
    return 4 if hardware.dtype_name(dtype, gpu=device.gpu) == "float32" else 2
