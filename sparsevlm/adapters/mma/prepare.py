"""The mixture-of-modality adapter of a recipe as PEFT's configuration."""

from __future__ import annotations

from typing import Any

from sparsevlm.adapters.mma.config import MmaConfig
from sparsevlm.adapters.mma.places import find_places
from sparsevlm.adapters.prepared import Prepared
from sparsevlm.moe.modality import goes_by_modality
from sparsevlm.recipe.adapter import Mma


def prepare(model: Any, spec: Mma) -> Prepared:
    """Find the attentions that a section adapts.

    Raises:
        ValueError: Layers or widths that the model does not have, a tower whose pictures are packed, or experts by
            modality, which the modalities that run through the decoder by themselves could not pass.
    """
    fusion, moe = model.config.fusion or {}, model.config.moe
    if fusion.get("type") == "visual_expert" or goes_by_modality(moe):
        raise ValueError(
            "mma: the model has experts for visual tokens (fusion visual_expert, or router scoring 'modality'), and "
            "the adapter's modalities are neither these nor text; take another adapter, as lora"
        )
    config = MmaConfig(**spec.model_dump(exclude={"type"}))
    places = tuple(find_places(model, config))
    tower = sum(name.startswith("model.vision_tower.") for name in places)
    if tower and spec.routing == "sample" and model.config.vision_native is not None:
        raise ValueError(
            "mma: at native resolution pictures are packed into one row of the tower, and routing by a picture's first "
            "token would take that of another; set vision_layers: null, or routing: token"
        )
    counts = {"language.attention": len(places) - tower, "vision.attention": tower}
    return Prepared(config, {part: count for part, count in counts.items() if count}, places)
