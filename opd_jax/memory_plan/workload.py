"""A run as its plan sees it: architectures, shapes and layout. Needs no weights and no tokenizer."""

import dataclasses
import os
from typing import Any

import optax
from ml_collections import ConfigDict

from opd_jax import hardware, models
from opd_jax.config import teacher_list
from opd_jax.config.validate import validate
from opd_jax.data import microbatches
from opd_jax.errors import ModelError
from opd_jax.hardware import Device
from opd_jax.memory_plan.layout import Layout, layout_of
from opd_jax.memory_plan.turns import ONE_TEACHER, Turns, make_turns
from opd_jax.models import ModelConfig, catalog
from opd_jax.rollout.generate import Shapes
from opd_jax.sharding import partition
from opd_jax.training.model_limits import teacher_response
from opd_jax.training.optimizer import make_optimizer
from opd_jax.training.setup import Setup
from opd_jax.training.terms import Terms, make_terms

_OF_ONE_FAMILY = 1_000  # ids by which vocabularies of one tokenizer family differ at most
_ALL = 10**9  # held-out problems where all are measured: the plan opens no file


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the plan is computed from: the numbers of a config, architectures, and a layout of devices.

    Attributes:
      student, teacher, reference: architectures; None where no term needs one.
      itemsize: bytes of a number of the compute dtype; teacher_itemsize, reference_itemsize: likewise.
      fused: whether attention is one kernel (a GPU, 16 bits).
      own_copy: whether the student's compute weights are a copy beside its float32 ones.
      teacher_follows: "frozen" has weights of its own, "average" and "live" are made of the student's.
      same_reference: whether the reference and the teacher share one copy of their weights.
      renumbered: whether the teacher has a second output matrix, in the order of the student's ids.
      vocabulary: ids that are scored; fewer than a model's rows make a copy of its output matrix.
      batch: rollouts a step. golden: golden rows an update (0 = none). updates: optimizer steps a step.
      prompt, response: their token budgets. teacher_width: of the teacher's own rows, 0 where it has none.
      slots, microbatch_tokens, token_chunk, score_chunk, remat: as in the config, slots resolved.
        `microbatch_tokens` is the limit of one replica.
      over_vocabulary: whether the update reads the teacher's output matrix and hidden states.
      terms: names of the loss terms. term_gradients: whether the gradient of each is measured by itself.
      rollouts: whether the loss needs any.
      evaluated: rows that an evaluation decodes at one time.
      steps: of the run.
      optimizer: decides which arrays are kept beside the weights.
      answer: token budget of an evaluation's answers. asks_teacher: whether the teacher answers as well.
      layout: of the devices.
      nucleus: whether sampling is cut to a nucleus (`rollout.top_p` < 1).
      support: ids of a token that scoring records for the loss (0 = none).
      support_arrays: arrays of as many numbers each that the update reads.
      reference_scores: whether rollouts are scored with the reference.
      reference_in_update: whether the update reads the reference, where there is one.
      gated: whether the divergence has a gate, one more number a token.
      jumps: whether the run tries jumps, which keep two copies of the weights in host memory.
      golden_divergence: whether golden solutions are scored for a divergence of their own.
      golden_over_vocabulary, golden_support: as those of rollouts.
      tile: widths of batches are multiples of it.
      teacher_vocabulary: ids of a teacher with another tokenizer, which scores its own rows alone; 0 where
        the two share ids. teacher_response: its token budget of a response there.
      span_events: what a divergence by spans of text compares; "" where there is none.
      replayed: whether rollouts are read from a recording: nothing is sampled, and no teacher scores.
      turns: further teachers.
      written: problems for which the student writes a text of the teacher's prompt, 0 without a harness;
        written_prompt, written_tokens: the budgets of its prompt and of the text.
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
    term_gradients: bool
    rollouts: bool
    evaluated: int
    steps: int
    optimizer: optax.GradientTransformation
    answer: int = 0
    asks_teacher: bool = False
    layout: Layout = dataclasses.field(default_factory=Layout)
    nucleus: bool = False
    support: int = 0
    support_arrays: int = 0
    reference_scores: bool = False
    reference_in_update: bool = True
    gated: bool = False
    jumps: bool = False
    golden_divergence: bool = False
    golden_over_vocabulary: bool = False
    golden_support: int = 0
    tile: int = 1
    teacher_vocabulary: int = 0
    teacher_response: int = 0
    replayed: bool = False
    span_events: str = ""
    turns: Turns = ONE_TEACHER
    written: int = 0
    written_prompt: int = 0
    written_tokens: int = 0

    @property
    def samples(self) -> bool:
        """Whether the run samples rollouts."""
        return self.rollouts and not self.replayed

    @property
    def of_golden(self) -> "Workload":
        """The workload whose rollouts are the golden solutions of a step: what scores and learns from them.

        The weight of each token in their divergence is one more number, as a gate is on rollouts.
        """
        return dataclasses.replace(
            self, batch=self.golden * self.updates, over_vocabulary=self.golden_over_vocabulary,
            support=self.golden_support, support_arrays=2, gated=self.golden_divergence,
            reference=None, reference_scores=False, reference_in_update=False,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Tokens of a row, prompt and response."""
        return self.prompt + self.response

    def itemsize_of(self, role: str) -> int:
        """Return the bytes of a number of a role's compute weights."""
        return self.itemsize if role == "student" else getattr(self, f"{role}_itemsize")

    @property
    def alone(self) -> "tuple[Workload, Workload]":
        """Student and teacher as workloads of one model each, as they score by spans of text."""
        assert self.teacher is not None
        none: dict[str, Any] = {"teacher": None, "teacher_width": 0, "teacher_vocabulary": 0}
        teacher = dataclasses.replace(
            self, student=self.teacher, itemsize=self.teacher_itemsize, vocabulary=self.teacher_vocabulary,
            prompt=self.teacher_width - self.teacher_response, response=self.teacher_response,
            layout=dataclasses.replace(self.layout, student=self.layout.teacher), **none,
        )  # fmt: skip
        return dataclasses.replace(self, over_vocabulary=False, **none), teacher

    @property
    def writing(self) -> "Workload":
        """The workload whose rollouts are what the student writes for the teacher."""
        return dataclasses.replace(
            self, batch=self.written, prompt=self.written_prompt, response=self.written_tokens,
            slots=min(self.slots, self.written),
        )  # fmt: skip

    @property
    def taught(self) -> "tuple[Workload, ...]":
        """The workloads of the teachers that score in turn, the first one first."""
        return (self, *(dataclasses.replace(self, teacher=other) for other in self.turns.others))

    @property
    def score_rows(self) -> int:
        """Rows of the widest micro-batch of scoring on a device."""
        if self.teacher_vocabulary:
            return max(one.score_rows for one in self.alone)
        return self._widest(self.turns.together(self.batch), self.teacher_width)

    @property
    def rollout_rows(self) -> int:
        """Rows of the widest micro-batch of rollouts in the update on a device."""
        return self._widest(self.batch // self.updates)

    @property
    def golden_rows(self) -> int:
        """Rows of the widest micro-batch of golden solutions in the update on a device."""
        return self._widest(self.golden)

    @property
    def device_batch(self) -> int:
        """A device's share of the rollouts of a step."""
        return -(-self.batch // self.layout.rows)

    @property
    def device_slots(self) -> int:
        """Slots of a device in training."""
        return self.slots_of(self.batch, self.slots)

    @property
    def device_answers(self) -> int:
        """Slots of a device in an evaluation."""
        return self.slots_of(self.evaluated, self.evaluated)

    def slots_of(self, prompts: int, slots: int) -> int:
        """Return the slots of a device where so many prompts are decoded in so many slots."""
        return Shapes.of(
            prompts, slots=slots, prompt_tokens=self.prompt, response_tokens=self.response,
            chunk=None, replicas=self.layout.rows,
        ).slots  # fmt: skip

    def _widest(self, batch: int, teacher_width: int = 0) -> int:
        """Return a device's rows of the widest micro-batch that `microbatches.split` makes of a batch."""
        if not batch:
            return 0
        replicas = self.layout.rows
        widest = microbatches.shapes(
            batch, width=self.width, tokens=self.microbatch_tokens, teacher_width=teacher_width,
            replicas=replicas, tile=self.tile,
        )[0]  # fmt: skip
        return widest.count // replicas


@dataclasses.dataclass(frozen=True)
class _Roles:
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


def of_config(config: ConfigDict, device: Device, devices: int) -> Workload:
    """Return the workload of a config; its models may be published names, and need no weights.

    Raises ConfigError, or ModelError where an architecture is not known here.
    """
    if not config.data.train:  # a recipe that wants a file: the plan does not read it
        config = config.copy_and_resolve_references()
        config.data.train = "tiny:train"
    validate(config)
    terms = make_terms(config)
    student, own = _architecture(config.student)
    tokens, others = own, 0
    teacher = reference = None
    further: list[tuple[str, ModelConfig]] = []
    itself = config.teacher.path in ("student", config.student.path)
    if terms.needs_teacher and not config.replay.path:
        section = config.student if config.teacher.path == "student" else config.teacher
        teacher, others = _architecture(section)
        tokens = min(tokens, others)
        for path in teacher_list.parse(config.teachers.others).values():
            role = config[
                "student" if path == "student" else "teacher"
            ].copy_and_resolve_references()
            role.path = config.student.path if path == "student" else path
            further.append((role.path, _architecture(role)[0]))
    if terms.needs_reference:
        section = config.reference if config.reference.path else config.student
        reference, _ = _architecture(section)
    data = config.data
    other_prompts = (data.teacher_prompt_template, data.teacher_system_prompt) != ("same", "same")
    separate = teacher is not None and (other_prompts or not itself)
    spans = False
    if teacher is not None:  # without tokenizers: one family has about as many tokens
        far = abs(own - others) > _OF_ONE_FAMILY and config.scoring.compare == "auto"
        spans = far or config.scoring.compare == "spans"
    width = config.rollout.max_prompt_tokens + teacher_response(config, spans=spans)
    width += config.harness.max_tokens * bool(config.harness.prompt)
    roles = _Roles(
        student=student, teacher=teacher, reference=reference,
        vocabulary=min(own if spans else tokens, student.vocab_size),
        teacher_width=width * (separate or spans),
        renumbered=not itself and config.scoring.special_tokens == "remap" and not spans,
        teacher_vocabulary=others * spans, others=tuple(further),
        problems=(config.eval.problems or _ALL) if config.eval.data else 0,
    )  # fmt: skip
    return _workload(config, terms, roles, device, devices)


def of_setup(setup: Setup, device: Device, devices: int) -> Workload:
    """Return the workload of a run that is about to start."""
    needs = setup.terms.needs_reference
    roles = _Roles(
        student=setup.student, teacher=setup.teacher,
        reference=setup.reference if needs else None, vocabulary=setup.alignment.vocabulary,
        teacher_width=setup.teacher_width if setup.separate_prompts else 0,
        renumbered=setup.alignment.head_rows is not None, problems=len(setup.held_out),
        teacher_vocabulary=setup.alignment.teacher.vocabulary if setup.alignment.teacher else 0,
        others=tuple((other.path, other.model) for other in setup.others),
    )  # fmt: skip
    return _workload(setup.config, setup.terms, roles, device, devices)


def _workload(
    config: ConfigDict, terms: Terms, roles: _Roles, device: Device, devices: int
) -> Workload:
    rollout, optim, teacher = config.rollout, config.optim, roles.teacher
    layout = layout_of(config, devices)
    for role in partition.ROLES:
        if (model := getattr(roles, role)) is not None:
            partition.check(role, model, layout.sizes, sharded=config.mesh[role] == "sharded")
    for _, other in roles.others:
        partition.check("teacher", other, layout.sizes, sharded=config.mesh.teacher == "sharded")
    first = config.student.path if config.teacher.path == "student" else config.teacher.path
    turns = make_turns(config.teachers, first, roles.others)
    itemsize = _itemsize(config.student.dtype, device)
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    answers = roles.problems * (config.eval.samples or 1)
    source = "reference" if config.reference.path else "student"
    frozen = teacher is not None and config.teacher.follow == "frozen"
    same = (config[source].path, config.reference.dtype) == (
        first,
        config.teacher.dtype,
    )
    return Workload(
        student=roles.student, teacher=teacher, reference=roles.reference, itemsize=itemsize,
        teacher_itemsize=_itemsize(config.teacher.dtype, device) if frozen else itemsize,
        reference_itemsize=_itemsize(config.reference.dtype, device),
        fused=device.gpu and itemsize == 2 and config.mesh.attention == "auto",
        own_copy=itemsize != 4 or layout.devices > 1,
        # Weights copied now and then are kept where a moving average is.
        teacher_follows="average" if config.teacher.follow == "every" else config.teacher.follow,
        same_reference=frozen and roles.reference is not None and same and not turns.wait,
        renumbered=teacher is not None and roles.renumbered,
        vocabulary=roles.vocabulary, batch=batch,
        golden=rollout.prompts_per_step // optim.updates_per_rollout if terms.needs_golden else 0,
        updates=optim.updates_per_rollout, prompt=rollout.max_prompt_tokens,
        response=rollout.max_response_tokens, teacher_width=roles.teacher_width,
        slots=min(rollout.slots or batch, batch), nucleus=rollout.top_p < 1,
        microbatch_tokens=optim.microbatch_tokens,
        token_chunk=optim.token_chunk, score_chunk=config.scoring.token_chunk, remat=optim.remat,
        over_vocabulary=terms.over_vocabulary,
        terms=terms.names, term_gradients=bool(config.log.gradients) and len(terms.names) > 1,
        rollouts=terms.needs_rollouts, evaluated=min(config.eval.slots or rollout.slots or 256, answers),
        answer=config.eval.max_response_tokens or rollout.max_response_tokens,
        asks_teacher=teacher is not None and config.eval.teacher,
        steps=config.steps, layout=layout,
        optimizer=make_optimizer(optim, config.steps * optim.updates_per_rollout),
        support=_places(terms.scored_support),
        # ids, and of a divergence the teacher's log-probs, of a surrogate the sampler's and advantages
        support_arrays=1 + (terms.divergence_weight != 0) + 2 * terms.on_support,
        reference_scores=terms.scores_reference,
        reference_in_update="reference_kl" in terms.names,
        gated=terms.gated, tile=hardware.tile(gpu=device.gpu), jumps=bool(config.jump.problems),
        golden_divergence=terms.golden_divergence != 0,
        golden_over_vocabulary=terms.golden_over_vocabulary,
        golden_support=_places(terms.golden_scored_support),
        teacher_vocabulary=roles.teacher_vocabulary,
        teacher_response=teacher_response(config, spans=bool(roles.teacher_vocabulary)),
        replayed=bool(config.replay.path),
        span_events=terms.span_events if roles.teacher_vocabulary and terms.over_vocabulary else "",
        turns=turns,
        written=rollout.prompts_per_step * bool(config.harness.prompt),
        written_prompt=config.harness.max_prompt_tokens, written_tokens=config.harness.max_tokens,
    )  # fmt: skip


def _places(support: tuple[str, int] | None) -> int:
    """Ids of a token's support: of one model's, or of both models'."""
    if support is None:
        return 0
    name, k = support
    return k * (2 if name in ("union", "symmetric_difference") else 1)


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
    return 4 if hardware.dtype_name(dtype, gpu=device.gpu) == "float32" else 2
