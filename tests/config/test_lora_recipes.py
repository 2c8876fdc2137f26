"""The option `lora=RANK` of recipes: the rank, and the learning rate that goes with it."""

import pytest

from configs import grpo, opd, opsd, recipes, sft, stable_opd, topk_opd
from opd_jax import config as configuration
from opd_jax.config.fields import TARGETS
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.models import low_rank

pytestmark = pytest.mark.short


@pytest.mark.parametrize("method", [opd, stable_opd, sft, topk_opd, grpo])
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_adapters_have_the_rank_and_ten_times_the_rate(method, recipe):
    one, other = (
        configuration.flatten(method.get_config(f"{recipe},data=a.jsonl{option}").to_dict())
        for option in ("", ",lora=64")
    )
    assert {k for k in one if one[k] != other[k]} == {"lora.rank", "optim.learning_rate"}
    assert other["lora.rank"] == 64
    rate = one["optim.learning_rate"]
    assert other["optim.learning_rate"] == pytest.approx(10 * rate)
    validate(method.get_config(f"{recipe},data=a.jsonl,lora=64"))


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_opsd_has_the_numbers_of_its_authors(recipe):
    config = opsd.get_config(f"{recipe},data=a.jsonl,lora=64")
    validate(config)
    assert (config.lora.rank, config.lora.alpha, config.optim.learning_rate) == (64, 128.0, 2e-4)
    assert set(config.lora.targets) == set(TARGETS)


@pytest.mark.parametrize("rank", ["x", "1.5", "-1"])
def test_a_rank_that_is_no_number_is_refused(rank):
    with pytest.raises(ConfigError, match=f"got lora='{rank}', wanted a whole number"):
        recipes.recipe(f"tiny,lora={rank}")


def test_targets_of_the_fields_are_those_of_the_model():
    assert tuple(low_rank.TARGETS) == TARGETS
