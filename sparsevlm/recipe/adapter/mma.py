"""`adapter: {type: mma}`: LaVIN's mixture-of-modality adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from sparsevlm.recipe.moe import LayerChoice
from sparsevlm.recipe.section import CrossFault, Positive, Strict, number


class Mma(Strict):
    """Small two-path adapters before the attentions of language model and tower, mixed by whether the sample has media.

    LaVIN (Luo et al., arXiv:2305.15023). It starts as the identity and cannot be merged, since what it adds depends on
    the sample: a stage with it is the last one.
    """

    mergeable: ClassVar[bool] = False
    zero: ClassVar[int] = 3

    type: Literal["mma"]
    """Kind of adapter."""
    hidden: int = Field(default=8, ge=1)
    """Width of the adapter."""
    groups: int = Field(default=2, ge=1)
    """Groups of the projections back up; a divisor of `hidden` and of the widths of both parts."""
    paths: int = Field(default=2, ge=1)
    """Projections back up that the router mixes."""
    modalities: Literal[2, 3] = 2
    """Kinds of samples that the router tells apart: text and image; with 3 also video."""
    scale: float = 1.0
    """Factor on what the adapter adds."""
    temperature: Positive = 10.0
    """Temperature of the router's softmax; LaVIN: 10 for 7B, 5 for 13B."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the adapter, while training."""
    routing: Literal["sample", "token"] = "sample"
    """`sample`, as published: by the modality of a sample, in the tower by the first token of a picture. `token`: each
    token chooses from its own state."""
    layers: LayerChoice | None = "all"
    """Layers of the language model: `all`, `alternate`, `first_half`, `second_half` or indices; `null` for none."""
    vision_layers: LayerChoice | None = "all"
    """The same for the tower, among the layers whose output is used; `null` for towers without attention layers."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        hidden, groups = number(raw.get("hidden", 8)), number(raw.get("groups", 2))
        if hidden and groups and groups >= 1 and hidden % groups:
            yield ("groups",), f"{groups:g} groups do not divide the width 'hidden: {hidden:g}'"
        if raw.get("layers", "all") is None and raw.get("vision_layers", "all") is None:
            yield ("layers",), "with 'vision_layers: null' too nothing is left to adapt"
