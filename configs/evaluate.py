"""Evaluation as the papers do it; the text after the colon is a protocol (opd_jax/evaluation/protocols.py).

python launch/evaluate.py --config=configs/evaluate.py:boxed --model=HF_DIR_OR_WORKDIR
    --config.eval.benchmarks=aime24=FILE,amc=FILE,math500=FILE

Without anything after the colon: the embedded problems (`tiny`), as the embedded models know them.
"""

from ml_collections import ConfigDict

from opd_jax.config.schema import near
from opd_jax.config.trees import EVALUATION
from opd_jax.errors import ConfigError
from opd_jax.evaluation.protocols import PROTOCOLS


def get_config(recipe: str | None = None) -> ConfigDict:
    """The config of a protocol."""
    name = recipe or "plain"
    if name in ("tiny", ""):
        name = "plain"
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is not known; {near(name, list(PROTOCOLS))}")
    chosen = PROTOCOLS[name]
    config = EVALUATION.default()
    config.data.prompt_template = chosen.prompt_template
    config.data.system_prompt = chosen.system_prompt
    config.eval.temperature = chosen.temperature
    config.eval.top_p = chosen.top_p
    config.eval.samples = chosen.samples
    config.eval.max_response_tokens = chosen.max_response_tokens
    config.eval.fallbacks = chosen.fallbacks
    config.eval.problems = 0  # all
    if name == "plain":
        config.eval.benchmarks = "tiny"
        config.metrics.repetition_tail = 100  # as in configs/recipes.py
        config.metrics.repetition_threshold = 2.2
    return config
