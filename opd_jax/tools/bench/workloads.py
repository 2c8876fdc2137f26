"""Decoding, scoring, updates and complete steps at given shapes, with the library's public functions.

Weights are random or come from a model folder. Where response lengths matter, a model that counts is used:
it continues token v with v + 1, so the last prompt token determines the length. Its matrices have the usual
shapes, and compiled programs do not depend on their values.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import data, scoring
from opd_jax.config import default
from opd_jax.models import Model, ModelConfig, Params, decoder, load, with_head_rows
from opd_jax.models.end_tokens import Events
from opd_jax.rollout import generate
from opd_jax.training import batch
from opd_jax.training.advantages import advantages
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.step_spec import StepSpec
from opd_jax.training.terms import default_terms
from opd_jax.types import Frozen, Rollout, RolloutRows, Scores

TERMS = default_terms(pg_weight=1.0)  # OPD: the sampled token's log-ratio as advantage
TOP_K = 16
_CERTAIN = 100.0  # the logit of the next token in a counting model


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure: its config, its compute dtype, and its weights in that dtype."""

    config: ModelConfig
    dtype: Any
    params: Params

    @property
    def itemsize(self) -> int:
        """Bytes per weight."""
        return jnp.dtype(self.dtype).itemsize


def random_subject(config: ModelConfig, dtype: Any, *, seed: int = 0) -> Subject:
    """Return a model with random weights, generated on the device."""
    return Subject(config, dtype, _random(jax.random.key(seed), config, jnp.dtype(dtype).name))


def loaded_subject(folder: str, dtype: Any) -> Subject:
    """Return a model with the weights of a folder."""
    config, params = load(folder, dtype=dtype)
    return Subject(config, dtype, params)


def counting_subject(config: ModelConfig, dtype: Any, *, seed: int = 0) -> Subject:
    """Return a model of this shape that continues token v with v + 1 almost certainly.

    No layer adds to the residual stream, and the output row of v + 1 is the embedding of v.
    """
    params = random_subject(config, dtype, seed=seed).params
    params.pop("head", None)  # the output matrix is derived from the embedding
    silent = {"output", "down"}
    layers = {
        name: jax.tree.map(jnp.zeros_like, part) if name in silent else part
        for name, part in params["layers"].items()
    }
    params = with_head_rows(params | {"layers": layers}, (jnp.arange(config.vocab_size) - 1))
    scale = _CERTAIN / (0.02 * config.hidden_size)
    kernel = (params["head"]["kernel"] * scale).astype(dtype)
    return Subject(config, dtype, params | {"head": {"kernel": kernel}})


def prompts_at_random(config: ModelConfig, count: int, length: int) -> list[list[int]]:
    """Return prompts of random ids, all of the same length."""
    draw = np.random.default_rng(0)
    return draw.integers(0, config.vocab_size, (count, length)).tolist()


def counting_prompts(
    config: ModelConfig, lengths: Sequence[int], prompt: int
) -> tuple[list[list[int]], int]:
    """Return prompts to which a counting model responds with these lengths, and the id to stop at."""
    stop = config.vocab_size - 1
    prompts = prompts_at_random(config, len(lengths), prompt)
    for row, length in zip(prompts, lengths, strict=True):
        row[-1] = stop - length
    return prompts, stop


def decode(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    budget: int,
    *,
    slots: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Rollout:
    """Sample rollouts at temperature 1 of at most `budget` tokens."""
    return generate(
        subject.params, subject.config, prompts,
        key=jax.random.key(1), max_response_tokens=budget, slots=slots, stop_ids=stop_ids,
    )  # fmt: skip


def random_rows(config: ModelConfig, count: int, width: int) -> RolloutRows:
    """Return full rows of random tokens for an update; every token counts."""
    draw = np.random.default_rng(0)
    shape = (count, width)
    return RolloutRows(
        tokens_BT=draw.integers(0, config.vocab_size, shape).astype(np.int32),
        length_B=np.full(count, width, np.int32),
        weight_BT=np.full(shape, 1.0 / (count * width), np.float32),
        advantage_BT=draw.standard_normal(shape).astype(np.float32),
        sampler_logprob_BT=np.full(shape, -float(np.log(config.vocab_size)), np.float32),
    )


def score(
    student: Subject,
    teacher: Subject | None,
    tokens_BT: np.ndarray,
    length_B: np.ndarray,
    *,
    microbatch_tokens: int,
    token_chunk: int,
) -> Scores:
    """Score rows with both models, with everything that the objective and the metrics of a run need."""
    models = scoring.Models(
        Model(student.config, student.params),
        Model(teacher.config, teacher.params) if teacher else None,
    )
    spec = scoring.ScoreSpec(TOP_K, token_chunk, Events(vocabulary=student.config.vocab_size))
    return scoring.score(models, tokens_BT, length_B, spec, microbatch_tokens=microbatch_tokens)


class Learner:
    """A student in training: its state, and the step functions of a run.

    `prompt` and `new` are the tokens of prompts and responses, needed for complete steps.
    """

    def __init__(
        self,
        student: ModelConfig,
        teacher: ModelConfig | None,
        dtype: Any,
        *,
        remat: str,
        microbatch_tokens: int,
        token_chunk: int,
        prompt: int = 1,
        new: int = 1,
    ):
        config = default().unlock()
        config.optim.update({"remat": remat, "microbatch_tokens": microbatch_tokens})
        config.optim.token_chunk = config.scoring.token_chunk = token_chunk
        config.rollout.update({"max_prompt_tokens": prompt, "max_response_tokens": new})
        config.loss.aggregation = "token"
        spec = StepSpec(
            config=config, terms=TERMS, student=student, teacher=teacher, reference=None,
            alignment=data.alone(student.vocab_size, ()), dtype=jnp.dtype(dtype),
        )  # fmt: skip
        self.functions = make_step_functions(spec)
        self.state = self.functions.initial_state(random_subject(student, jnp.float32).params)

    def update(self, rollout_rows: RolloutRows) -> dict[str, jax.Array]:
        """Take one optimizer step; return its metrics."""
        self.state, metrics = self.functions.update(
            self.state, Frozen(), rollout_rows, None, TERMS.weights
        )
        return metrics

    def step(self, teacher: Params, prompts: Sequence[Sequence[int]]) -> dict[str, jax.Array]:
        """Take a complete OPD step as in a run (roll out, score, update), but without grading and metrics."""
        functions = self.functions
        student = functions.compute_weights(self.state.params)
        rollout = functions.generate(student, prompts, jax.random.key(1))
        scores = functions.score(student, teacher, rollout)
        del student  # the update does not need it
        mask_BT = rollout.response_mask_BT
        advantage_BT = advantages(rollout, scores, mask_BT, TERMS)
        return self.update(
            batch.rollout_rows(rollout, scores, mask_BT, advantage_BT, TERMS, weigh=functions.weigh)
        )


@partial(jax.jit, static_argnames=("config", "dtype"))
def _random(key: jax.Array, config: ModelConfig, dtype: str) -> Params:
    return jax.tree.map(lambda w: w.astype(dtype), decoder.init(key, config))
