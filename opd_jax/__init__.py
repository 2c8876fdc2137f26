"""On-policy distillation (OPD) and Stable-OPD of language models in JAX.

`PUBLIC` lists the names that users may rely on. Their packages are imported when they are first used, because
importing `opd_jax` must not import jax: the commands set environment variables before jax starts.

    import opd_jax

    config, params = opd_jax.models.load("models/student")
"""

import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names, below `opd_jax.`; `*` stands for all names in the `__all__` of a package.
PUBLIC = (
    "models.load",
    "models.save",
    "models.forward",
    "rollout.generate",
    "scoring.token_logprob",
    "losses.*",
    "metrics.*",
    "data.Problem",
    "data.Tokenizer",
    "data.open_problems",
    "grading.Grade",
    "grading.Grader",
    "grading.grade",
    "tools.prepare_data.run.prepare",
)
__all__ = sorted({name.partition(".")[0] for name in PUBLIC})

# Modules that had another name before the packages: old -> new, both below `opd_jax.`.
MOVED = {
    "account": "models.flops",
    "ahead": "training.precompile",
    "aliases": "config.aliases",
    "batching": "data.microbatches",
    "bench": "tools.bench",
    "best": "checkpoint.best",
    "clock": "metrics.timing",
    "collect": "training.experience",
    "comparison": "tools.sweep",
    "copies": "sharding.replica_check",
    "data.alignment": "data.vocabulary",
    "data.decontaminate": "tools.prepare_data.decontaminate",
    "data.judge": "tools.prepare_data.filters",
    "data.loader": "data.batches and opd_jax.data.prompts",
    "data.prepare": "tools.prepare_data.run",
    "data.prepare_config": "tools.prepare_data.config",
    "data.seam": "data.template_boundary",
    "data.source": "data.dataset",
    "data.tiny": "data.arithmetic",
    "devices": "hardware",
    "display": "workdir.console",
    "eval": "grading (answers) and opd_jax.evaluation (benchmarks)",
    "export": "checkpoint.export",
    "failures": "memory_plan.failures",
    "fitting": "data.length_filter",
    "guard": "training.collapse_guard",
    "held_out": "evaluation.held_out",
    "intact": "checkpoint.manifest",
    "keys": "rng",
    "living": "workdir.trackers",
    "loading": "training.weights",
    "losses.reduction": "losses.token_weights",
    "losses.sampled": "losses.policy_gradient, opd_jax.losses.kl and opd_jax.losses.supervised",
    "mesh": "sharding.mesh",
    "models.architecture": "models.config",
    "models.cache": "models.kv_cache",
    "models.events": "models.end_tokens",
    "models.fields": "models.json_fields",
    "models.hf": "models.hf_load",
    "models.inventory": "models.hf_inventory",
    "models.layout": "models.hf_names",
    "models.published": "models.catalog",
    "models.saving": "models.hf_save",
    "models.scaling": "models.rope_scaling",
    "models.summing": "models.layer_gradients",
    "models.weights": "models.safetensors_files",
    "numerics": "training.nonfinite",
    "objectives": "training.objective",
    "placement": "sharding.partition",
    "plan": "memory_plan",
    "probe": "tools.probe",
    "processes": "sharding.multihost",
    "profile": "tools.profile.run",
    "profiling": "metrics.tracing",
    "programs": "aot",
    "repetition": "metrics.repetition",
    "resume": "checkpoint.resume",
    "right_wrong": "metrics.correctness",
    "rollout.decoding": "rollout.decode_state",
    "rows": "training.batch",
    "rules": "config.validate",
    "sample": "tools.cold_start.run",
    "sample_file": "tools.cold_start",
    "setup": "training.setup",
    "signals": "workdir.stop",
    "stepping": "training.step",
    "supports": "scoring.topk",
    "trace": "tools.profile.trace",
    "unused": "config.no_effect",
    "update": "training.update",
    "whole": "workdir.atomic",
}


def _moved(name: str) -> str:
    return f"opd_jax.{name} has moved: it is opd_jax.{MOVED[name]} now"


class _OldNames(importlib.abc.MetaPathFinder):
    """Say where a module has moved when it is imported under its old name."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError for an old name; leave every other name to Python."""
        old = name.removeprefix("opd_jax.")
        if name != old and old in MOVED:
            raise ImportError(_moved(old), name=name)


# In front of all other finders: a folder that an update has emptied imports as a namespace package.
sys.meta_path.insert(0, _OldNames())

if not TYPE_CHECKING:  # mypy reports names that do not exist

    def __getattr__(name: str) -> Any:
        """Import a public package when it is first used; say where an old name has moved."""
        if name in __all__:
            return importlib.import_module(f"opd_jax.{name}")
        if name in MOVED:
            raise AttributeError(_moved(name))
        raise AttributeError(f"module 'opd_jax' has no attribute {name!r}")
