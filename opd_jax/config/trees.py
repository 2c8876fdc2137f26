"""Which fields each entry point reads. Several read the same field, and it means the same to all of them.

An experiment file (configs/) has the fields of training, cold start and probes in one tree; the entry
point that is started with it takes its own, and refuses to set any other by name. launch/evaluate.py has
config files of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config.fields import BENCHMARKS, FIELDS, SECTIONS
from opd_jax.config.record import Field, Section, by_name, make_config

MODEL = "--model"  # a flag and no field


@dataclasses.dataclass(frozen=True)
class Tree:
    """The fields that an entry point reads.

    Attributes:
      program: the entry point.
      sections: the table with these fields alone.
      instead: name of a field that is not read -> the one that has its place here.
      maker: what a program calls for the tree with every default.
    """

    program: str
    sections: tuple[Section, ...]
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    maker: str = "opd_jax.config.default()"

    @property
    def fields(self) -> dict[str, Field]:
        """The record of each field by its dotted name, in the order of the table."""
        return by_name(self.sections)

    def default(self) -> ConfigDict:
        """The tree with every default."""
        return make_config(self.fields)

    def of(self, config: ConfigDict) -> ConfigDict:
        """The fields of this tree with their values in `config`; those that it lacks have their defaults."""
        found = self.default()
        for name in self.fields:
            place: Any = config
            target: Any = found
            *sections, last = name.split(".")
            for section in sections:
                place, target = place.get(section, {}), target[section]
            with target.ignore_type():
                target[last] = place.get(last, target[last])
        return found


def _reading(*starts: str, without: tuple[str, ...] = ()) -> tuple[Section, ...]:
    """The table with the fields alone whose dotted names start so."""

    def reads(section: Section, field: Field) -> bool:
        name = f"{section.name}.{field.name}".lstrip(".")
        return name.startswith(starts) and name not in without

    found = []
    for section in (*SECTIONS, BENCHMARKS):
        fields = tuple(field for field in section.fields if reads(section, field))
        found += [dataclasses.replace(section, fields=fields)] if fields else []
    return tuple(found)


def _names(*sections: Section) -> tuple[str, ...]:
    return tuple(by_name(sections))


_ANSWERS = ("seed", "data.columns.", "data.bad_rows", "data.prompt_template", "data.system_prompt",
            "data.date", "grading.", "metrics.repetition_")  # fmt: skip
_MODEL_FIELDS = ("dtype", "rope_theta", "max_position", "chat_template", "enable_thinking")

TRAINING = Tree(
    "launch/train.py",
    _reading("", without=tuple(f for f in FIELDS if f.startswith(("sample.", "probe.")))
             + _names(BENCHMARKS)),
)  # fmt: skip
EXPERIMENT = Tree("an experiment file", SECTIONS)
SAMPLING = Tree(
    "launch/sample.py",
    _reading(*_ANSWERS, "data.train", "data.size", "data.teacher_", "rollout.max_", "sample.",
             "teacher.path", *(f"teacher.{name}" for name in _MODEL_FIELDS),
             # of the student where teacher.path=student, or where solutions are chosen for it
             "student.path", *(f"student.{name}" for name in _MODEL_FIELDS)),
    {
        "student.path": "teacher.path",
        "rollout.prompts_per_step": "sample.batch",
        "rollout.samples_per_prompt": "sample.samples",
        "rollout.max_response_tokens": "sample.max_response_tokens",
        "rollout.temperature": "sample.temperature",
        "rollout.top_p": "sample.top_p",
        "rollout.top_k": "sample.top_k",
        "rollout.slots": "sample.slots",
    },
)  # fmt: skip
PROBING = Tree(
    "launch/probe.py",
    _reading("seed", "student.", "teacher.", "data.", "rollout.", "scoring.", "grading.", "metrics.",
             "optim.microbatch_tokens", "probe.",
             without=("data.epochs", "teacher.decay", "rollout.horizon", "rollout.horizon_steps",
                      "rollout.horizon_entropy")),
)  # fmt: skip
EVALUATION = Tree(
    "launch/evaluate.py",
    _reading(*_ANSWERS, *(f"student.{name}" for name in _MODEL_FIELDS), "rollout.max_response_tokens",
             "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.student", "mesh.allocator",
             "mesh.attention", "eval.",
             without=("eval.every", "eval.data", "eval.teacher", "eval.match", "eval.best")),
    {
        "student.path": MODEL,
        "data.train": "eval.benchmarks",
        "eval.data": "eval.benchmarks",
        "rollout.prompts_per_step": "eval.batch",
        "rollout.samples_per_prompt": "eval.samples",
        "rollout.max_response_tokens": "eval.max_response_tokens",
        "rollout.temperature": "eval.temperature",
        "rollout.top_p": "eval.top_p",
        "rollout.top_k": "eval.top_k",
        "rollout.slots": "eval.slots",
    },
    maker="opd_jax.config.EVALUATION.default()",
)  # fmt: skip
TREES = (TRAINING, EVALUATION, SAMPLING, PROBING)
