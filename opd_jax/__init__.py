"""On-policy distillation (OPD) and Stable-OPD of language models in JAX.

`PUBLIC` lists the names that users may rely on. Their packages are imported when they are first used, because
importing `opd_jax` must not import jax: the commands set environment variables before jax starts.

    import opd_jax

    config, params = opd_jax.models.load("models/student")
"""

import importlib
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

# Public names of version 0.1 that have moved; docs/changelog.md has the other modules.
_MOVED = {
    "eval": "opd_jax.eval has moved: answers are graded in opd_jax.grading, benchmarks are in "
    "opd_jax.evaluation",
}

if not TYPE_CHECKING:  # mypy reports names that do not exist

    def __getattr__(name: str) -> Any:
        """Import a public package when it is first used."""
        if name in __all__:
            return importlib.import_module(f"opd_jax.{name}")
        raise AttributeError(_MOVED.get(name, f"module 'opd_jax' has no attribute {name!r}"))
