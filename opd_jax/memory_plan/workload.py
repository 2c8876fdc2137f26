"""A run as its plan sees it: architectures, shapes and placement; no weights, no tokenizer needed."""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict

from opd_jax import models
from opd_jax.config import validate
from opd_jax.errors import ConfigError, ModelError
from opd_jax.hardware import Device
from opd_jax.models import ModelConfig, catalog
from opd_jax.sharding import partition
from opd_jax.training.objective import Terms, make_terms
from opd_jax.training.setup import Setup

_ALL = 10**9  # held-out problems where all are measured: the plan opens no file


@dataclasses.dataclass(frozen=True)
class Layout:
    """How devices stand and who is divided over them.

    Rows and slots go over `data` x `fsdp`, heads and MLP over `tensor`; the vocabulary is whole. The
    float32 state is divided like the weights and over data x fsdp as well. `student`, `teacher`,
    `reference`: compute weights "replicated" over data x fsdp, or "sharded" over fsdp.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    student: str = "replicated"
    teacher: str = "replicated"
    reference: str = "replicated"

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor

    @property
    def sizes(self) -> partition.Sizes:
        """Devices along each axis."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    @property
    def rows(self) -> int:
        """Devices that rows are divided over."""
        return self.data * self.fsdp

    def sharded(self, role: str) -> int:
        """Over how many devices a role's compute weights are divided, `tensor` aside."""
        return self.fsdp if getattr(self, role) == "sharded" else 1


@dataclasses.dataclass(frozen=True)
class Job:
    """What the plan is computed from.

    Attributes:
      student, teacher, reference: architectures; None where no term needs one.
      itemsize: bytes of a number that is computed with; teacher_itemsize, reference_itemsize: likewise.
      fused: whether attention is one kernel (a GPU, 16 bits).
      own_copy: whether the student's compute weights are a copy beside its float32 ones.
      teacher_follows: "frozen" has weights of its own, "average" and "live" are made of the student's.
      same_reference: whether the reference is the teacher's very weights.
      renumbered: whether the teacher has a second output matrix, in the order of the student's ids.
      vocabulary: ids that are scored; fewer than a model's rows make a copy of its output matrix.
      batch, golden: rollouts a step, golden rows an update (0 = none); updates: optimizer steps a step.
      prompt, response: their budgets; teacher_width: of the teacher's own rows, 0 where it has none.
      nucleus: whether tokens are drawn from the likeliest that have a mass (`rollout.top_p` < 1).
      slots, microbatch_tokens, token_chunk, score_chunk, remat: as in the config, slots resolved.
        A device's share of micro-batches is `microbatch_tokens`, whatever the layout.
      over_vocabulary: whether the update takes the teacher's output matrix and the hidden states that
        scoring kept of it.
      terms: of the loss, by name; apart: whether their gradients are looked at one by one.
      evaluated: rows that an evaluation decodes at one time, of answers of up to `answer` tokens;
        asks_teacher: whether the teacher answers too, for the closing table.
      rollouts: whether any are made.
      steps: of the run.
      layout: of the devices.
      support: ids of a token that scoring takes down for the loss, with the mass outside them (0 = none);
        support_arrays: of as many numbers each that the update takes.
    """

    student: ModelConfig
    teacher: ModelConfig | None
    reference: ModelConfig | None
    itemsize: int
    teacher_itemsize: int
    reference_itemsize: int
    fused: bool
    own_copy: bool
    teacher_follows: str
    same_reference: bool
    renumbered: bool
    vocabulary: int
    batch: int
    golden: int
    updates: int
    prompt: int
    response: int
    teacher_width: int
    slots: int
    microbatch_tokens: int
    token_chunk: int
    score_chunk: int
    remat: str
    over_vocabulary: bool
    terms: tuple[str, ...]
    apart: bool
    rollouts: bool
    evaluated: int
    steps: int
    answer: int = 0
    asks_teacher: bool = False
    layout: Layout = Layout()
    nucleus: bool = False
    support: int = 0
    support_arrays: int = 0

    @property
    def width(self) -> int:
        """Tokens of a whole row."""
        return self.prompt + self.response

    @property
    def microbatch_rows(self) -> int:
        """Rows of the widest micro-batch on a device: even shares, as batching.split makes them."""
        return _even(self.device_batch, self.microbatch_tokens // self._widest)

    @property
    def golden_rows(self) -> int:
        """Likewise of golden solutions."""
        return _even(-(-self.golden // self.layout.rows), self.microbatch_tokens // self.width)

    @property
    def device_batch(self) -> int:
        """A device's rollouts of one update."""
        return -(-(self.batch // self.updates) // self.layout.rows)

    @property
    def device_slots(self) -> int:
        """A device's share of the slots."""
        return -(-self.slots // self.layout.rows)

    @property
    def _widest(self) -> int:
        return max(self.width, self.teacher_width)


def of_config(config: ConfigDict, device: Device, devices: int) -> Job:
    """The job of a config whose models' folders or names need not be there with their weights.

    Raises ConfigError, or ModelError where an architecture is not known here.
    """
    if not config.data.train:  # a recipe that wants a file: the plan does not read it
        config = config.copy_and_resolve_references()
        config.data.train = "tiny:train"
    validate(config)
    terms = make_terms(config)
    student, tokens = _architecture(config.student)
    teacher = reference = None
    itself = config.teacher.path in ("student", config.student.path)
    if terms.needs_teacher:
        section = config.student if config.teacher.path == "student" else config.teacher
        teacher, others = _architecture(section)
        tokens = min(tokens, others)
    if terms.needs_reference:
        section = config.reference if config.reference.path else config.student
        reference, _ = _architecture(section)
    data = config.data
    other_prompts = (data.teacher_prompt_template, data.teacher_system_prompt) != ("same", "same")
    separate = teacher is not None and (other_prompts or not itself)
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    return _job(
        config, terms, device, devices, student=student, teacher=teacher, reference=reference,
        vocabulary=min(tokens, student.vocab_size), teacher_width=width * separate,
        renumbered=not itself and config.scoring.special_tokens == "remap",
        problems=(config.eval.problems or _ALL) if config.eval.data else 0,
    )  # fmt: skip


def of_setup(setup: Setup, device: Device, devices: int) -> Job:
    """The job of a run that is about to start."""
    needs = setup.terms.needs_reference
    return _job(
        setup.config, setup.terms, device, devices, student=setup.student, teacher=setup.teacher,
        reference=setup.reference if needs else None, vocabulary=setup.alignment.vocabulary,
        teacher_width=setup.teacher_width if setup.separate_prompts else 0,
        renumbered=setup.alignment.head_rows is not None, problems=len(setup.held_out),
    )  # fmt: skip


def _job(
    config: ConfigDict,
    terms: Terms,
    device: Device,
    devices: int,
    *,
    student: ModelConfig,
    teacher: ModelConfig | None,
    reference: ModelConfig | None,
    vocabulary: int,
    teacher_width: int,
    renumbered: bool,
    problems: int,
) -> Job:
    rollout, optim = config.rollout, config.optim
    layout = layout_of(config, devices)
    for role, model in (("student", student), ("teacher", teacher), ("reference", reference)):
        if model is not None:
            partition.check(role, model, layout.sizes, sharded=config.mesh[role] == "sharded")
    itemsize = _itemsize(config.student.dtype, device)
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    answers = problems * (config.eval.samples or 1)
    named = [role for role in ("student", "teacher", "reference") if config[role].path]
    source = "reference" if "reference" in named else "student"
    frozen = teacher is not None and config.teacher.follow == "frozen"
    same = (config[source].path, config.reference.dtype) == (
        config.student.path if config.teacher.path == "student" else config.teacher.path,
        config.teacher.dtype,
    )
    return Job(
        student=student, teacher=teacher, reference=reference, itemsize=itemsize,
        teacher_itemsize=_itemsize(config.teacher.dtype, device) if frozen else itemsize,
        reference_itemsize=_itemsize(config.reference.dtype, device),
        fused=device.gpu and itemsize == 2,
        own_copy=itemsize != 4 or layout.devices > 1,
        teacher_follows=config.teacher.follow,
        same_reference=frozen and reference is not None and same,
        renumbered=teacher is not None and renumbered,
        vocabulary=vocabulary, batch=batch,
        golden=rollout.prompts_per_step // optim.updates_per_rollout if terms.needs_golden else 0,
        updates=optim.updates_per_rollout, prompt=rollout.max_prompt_tokens,
        response=rollout.max_response_tokens, teacher_width=teacher_width,
        slots=min(rollout.slots or batch, batch), nucleus=rollout.top_p < 1,
        microbatch_tokens=optim.microbatch_tokens,
        token_chunk=optim.token_chunk, score_chunk=config.scoring.token_chunk, remat=optim.remat,
        over_vocabulary=terms.over_vocabulary,
        terms=terms.names, apart=bool(config.log.gradients) and len(terms.names) > 1,
        rollouts=terms.needs_rollouts, evaluated=min(config.eval.slots or rollout.slots or 256, answers),
        answer=config.eval.max_response_tokens or rollout.max_response_tokens,
        asks_teacher=teacher is not None and config.eval.teacher,
        steps=config.steps, layout=layout,
        support=_places(terms),
        # ids, and of a divergence the teacher's log-probs, of a surrogate the sampler's and advantages
        support_arrays=1 + (terms.divergence_weight != 0) + 2 * terms.on_support,
    )  # fmt: skip


def _places(terms: Terms) -> int:
    """Ids of a token's support: of one model's, or of both models'."""
    if terms.scored_support is None:
        return 0
    name, k = terms.scored_support
    return k * (2 if name in ("union", "symmetric_difference") else 1)


def layout_of(config: ConfigDict, devices: int) -> Layout:
    """The config's mesh on so many devices.

    Raises ConfigError: axes that do not multiply to the number of devices.
    """
    section = config.mesh
    inner = section.fsdp * section.tensor
    data = section.data if section.data > 0 else max(devices // inner, 1)
    if data * inner != devices:
        raise ConfigError(
            f"mesh.data={section.data} x mesh.fsdp={section.fsdp} x mesh.tensor={section.tensor} is "
            f"not the number of devices, {devices}; set --config.mesh.data=-1 and fsdp x tensor to "
            f"a divisor of {devices}"
        )
    roles = {role: section[role] for role in partition.ROLES}
    return Layout(data, section.fsdp, section.tensor, **roles)


def _architecture(section: Any) -> tuple[ModelConfig, int]:
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


def _itemsize(dtype: str, device: Device) -> int:
    if dtype == "auto":
        return 2 if device.gpu else 4
    return 4 if dtype == "float32" else 2


def _even(batch: int, most: int) -> int:
    """Rows of a micro-batch where `batch` rows are cut into even shares of at most `most`."""
    if not batch:
        return 0
    return -(-batch // -(-batch // max(most, 1)))
