"""Model configs of the recipes that the package ships."""

from typing import Any

import yaml

from fastssl.cli.pretrain import recipes
from fastssl.models.wav2vec2 import GumbelTemperature
from fastssl.train.systems import SYSTEMS


def recipe_model(name: str) -> Any:
    """Return the model config of a recipe, in the config class of the recipe's system."""
    recipe = yaml.safe_load(recipes()[name].read_text())
    given: dict[str, Any] = recipe.get("model", {})
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if "gumbel_temperature" in values:
        values["gumbel_temperature"] = GumbelTemperature(**values["gumbel_temperature"])
    config: Any = SYSTEMS[recipe["system"]].config_class
    return config(**values)
