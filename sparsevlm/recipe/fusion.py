"""`model.fusion`: how visual tokens reach the language model, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsevlm.recipe.section import Strict


class GatedCrossAttentionFusion(Strict):
    """Gated cross-attention to media that stay beside the text (Flamingo, Alayrac et al., arXiv:2204.14198).

    Before every `every`-th decoder layer, a block adds what the text attends to in the media, and an FFN, each behind a
    gate that is closed at the start: the language model computes what it did. A picture or video then takes one token
    of the prompt, whatever its visual tokens; the connector may end at any width.
    """

    type: Literal["gated_cross_attention"]
    """Kind of fusion."""
    every: int = Field(default=4, ge=1)
    """A block stands before each layer whose number, counted from 1, is a multiple of this."""
    heads: int = Field(default=8, ge=1)
    """Attention heads."""
    head_dim: int = Field(default=64, ge=1)
    """Width of a head."""
    ff_mult: int = Field(default=4, ge=1)
    """Width of the FFN, as a multiple of the language model's."""
    sees: Literal["last", "all"] = "last"
    """Media that a text token sees: the `last` one before it, or `all` before it."""


Fusion = Annotated[GatedCrossAttentionFusion, Field()]
"""What `model.fusion` may be."""
