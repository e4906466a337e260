"""Configuration of towers side by side; apart from their model, since a model's configuration may hold it."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

ITS_LAYER = "vision_feature_layer"
"""Under this name the configuration of each tower says which of its layers is read."""


@strict
class SideBySideConfig(PreTrainedConfig):
    """Configuration of `SideBySideModel`.

    Args:
        towers: Configuration of each tower as a mapping; `vision_feature_layer` in it is the layer that is read.
        sides: Side in pixels at which each tower sees a picture.
        means: Channel means of each tower; the first are those of the pictures that come in.
        stds: Channel standard deviations of each.
        image_size: Side in pixels of the pictures that come in: the largest of `sides`.
    """

    model_type = "sparsevlm_towers"
    towers: list[dict[str, Any]] | None = None
    sides: list[int] | None = None
    means: list[list[float]] | None = None
    stds: list[list[float]] | None = None
    image_size: int = 0

    @property
    def configs(self) -> list[PreTrainedConfig]:
        """A configuration object for each tower."""
        found = []
        for raw in copy.deepcopy(self.towers or []):
            found.append(AutoConfig.for_model(raw.pop("model_type"), **raw))
        return found


AutoConfig.register(SideBySideConfig.model_type, SideBySideConfig, exist_ok=True)
