"""`adapter: {type: partial_lora}` and `{type: slice_lora}`: LoRA that a token passes or not by what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Positive, Strict, names


class PartialLora(Strict):
    """LoRA in the language model that only visual tokens pass; text tokens see the frozen weights, to the bit.

    Partial LoRA of InternLM-XComposer2 (Dong et al., arXiv:2401.16420), with its values as defaults. It cannot be
    merged, since what it adds depends on the token: a stage with it is the last one.
    """

    mergeable: ClassVar[bool] = False
    zero: ClassVar[int] = 3

    type: Literal["partial_lora"]
    """Kind of adapter."""
    r: int = Field(default=256, ge=1)
    """Rank."""
    alpha: Positive = 256
    """The addition is multiplied by `alpha / r`."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the input of the addition, while training."""
    tokens: Literal["visual", "image", "video"] = "visual"
    """Which tokens pass it: all visual ones, or only those of pictures or of videos."""
    targets: list[str] = Field(default=["language"], min_length=1)
    """What is adapted: `language`, `language.attention`, `language.ffn` (dense FFNs) or patterns of linear layers of
    the language model (`o_proj`, `model.language_model.layers.1.*`)."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from _target_faults(raw, "language", "is for the language model's linear layers")


class SliceLora(Strict):
    """LoRA sets in the vision tower, one for each position of a slice in its picture and one for the whole picture.

    Monkey (Li et al., arXiv:2311.06607). Frames of a video and views count as slices. It cannot be merged, since what
    it adds depends on the slice: a stage with it is the last one.
    """

    mergeable: ClassVar[bool] = False
    zero: ClassVar[int] = 3

    type: Literal["slice_lora"]
    """Kind of adapter."""
    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: Positive = 16
    """The addition is multiplied by `alpha / r`."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the input of the addition, while training."""
    sets: int = Field(default=4, ge=1)
    """Sets. Position p (slices of a picture from the top left, frames of a video, views: from 0) passes set
    `p % sets`."""
    whole: Literal["own", "none"] = "own"
    """What a whole picture passes (a picture that is not cut up, and the global view of one that is): a set of its
    `own`, one more than `sets`, or `none`, as in Monkey's code."""
    targets: list[str] = Field(default=["vision"], min_length=1)
    """What is adapted: `vision`, `vision.attention`, `vision.ffn` or patterns of linear layers of the tower."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from _target_faults(raw, "vision", "is for the tower's linear layers")


_PARTS = ("language", "vision", "connector", "fusion", "moe")


def _target_faults(raw: dict[str, Any], part: str, what: str) -> Iterator[CrossFault]:
    """Yield targets that are another part, or named twice."""
    targets = names(raw.get("targets"))
    for i, target in enumerate(targets):
        if target.split(".")[0] in _PARTS and target.split(".")[0] != part:
            yield ("targets", i), f"{target!r} cannot be a target: this adapter {what}"
        elif target in targets[:i]:
            yield ("targets", i), f"target {target!r} is named twice"
