"""Rollouts and scores with their settings as keywords, for tests that change one at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import scoring
from opd_jax.models import Model, ModelConfig, Params, decoder
from opd_jax.models.end_tokens import EVERY_ID
from opd_jax.rollout import Batching, SamplingParams, row_keys, sample_responses
from opd_jax.types import Rollout, Scores

forward = jax.jit(
    decoder.forward, static_argnames="config"
)  # eager, each of its operations compiles
hidden_states = jax.jit(decoder.hidden_states, static_argnames="config")

_BATCHING = {field.name for field in dataclasses.fields(Batching)}
_SPEC = {field.name for field in dataclasses.fields(scoring.ScoreSpec)}


def roll(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    **settings: Any,
) -> Rollout:
    """`sample_responses`; `settings` are fields of SamplingParams and of Batching."""
    batching = {name: settings.pop(name) for name in _BATCHING & settings.keys()}
    return sample_responses(
        Model(config, params), prompts, SamplingParams(**settings),
        keys=row_keys(key, len(prompts)), batching=Batching(**batching),
    )  # fmt: skip


def score(
    student: Params,
    student_config: ModelConfig,
    teacher: Params | None,
    teacher_config: ModelConfig | None,
    tokens_BT: np.ndarray,
    length_B: np.ndarray,
    vocabulary: int,
    reference: Model | None = None,
    **settings: Any,
) -> Scores:
    """`scoring.score`; `settings` are its own and the fields of ScoreSpec."""
    spec = {name: settings.pop(name) for name in _SPEC & settings.keys()}
    other = None
    if teacher is not None:
        assert teacher_config is not None
        other = Model(teacher_config, teacher)
    events = spec.pop("events", EVERY_ID).replace(vocabulary=vocabulary)
    return scoring.score(
        scoring.Models(Model(student_config, student), other, reference), tokens_BT, length_B,
        scoring.ScoreSpec(events=events, **spec), **settings,
    )  # fmt: skip
