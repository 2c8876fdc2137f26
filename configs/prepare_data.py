"""Training files from raw problems.

python launch/prepare_data.py --config=configs/prepare_data.py --config.data.train=FILE --out=DIR

The paper's data (arXiv 2604.08527), from a local copy of OpenR1-Math-220k:
python launch/prepare_data.py --config=configs/prepare_data.py:openr1-math --out=DIR
    --config.data.train='OpenR1-Math-220k/data/*.parquet' --config.filter.tokenizer=Qwen2.5-Math-7B

docs/data.md tells what is done with the rows, and how to name benchmark files.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from opd_jax.config.schema import near
from opd_jax.errors import ConfigError
from opd_jax.tools.prepare_data.config import default


def get_config(recipe: str | None = None) -> ConfigDict:
    """The config of a recipe."""
    name = recipe or "generic"
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not known; {near(name, list(RECIPES))}")
    config = default()
    RECIPES[name](config)
    return config


def generic(config: ConfigDict) -> None:
    """Any file: the defaults."""


def openr1_math(config: ConfigDict) -> None:
    """OpenR1-Math-220k `default`, 94k problems -> 46k -> 33k for SFT, 13k for OPD.

    2604.08527, 5.1: "Starting from the default 94k-prompt split, we filter out generations that
    exceed 8192 tokens or are marked incorrect by Math-Verify", after LUFFY (2504.14945), which also
    asks for is_reasoning_complete; "supervised fine-tuning on 33k samples", "OPD on the remaining
    13k samples".
    """
    config.data.columns.problem = "problem"
    config.data.columns.solution = "generations"  # not `solution`, which is a human's
    config.filter.max_tokens = 8192
    config.split.sft = 33_000
    config.split.opd = 0  # the remaining ones


RECIPES: dict[str, Callable[[ConfigDict], None]] = {
    "generic": generic,
    "openr1-math": openr1_math,
}
