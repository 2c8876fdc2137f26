"""Student, teacher and reference: Hugging Face folders as pure functions of parameter trees."""

from opd_jax.models.config import ModelConfig
from opd_jax.models.decoder import Params, forward, with_head_rows
from opd_jax.models.hf_load import check_weights, load, load_config
from opd_jax.models.hf_save import check_free, save
from opd_jax.models.hub import locate

__all__ = [
    "ModelConfig",
    "Params",
    "check_free",
    "check_weights",
    "forward",
    "load",
    "load_config",
    "locate",
    "save",
    "with_head_rows",
]
