"""`model.fusion`: how visual tokens reach the language model, told apart by `type`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from sparsevlm.recipe.moe import LayerChoice, layer_faults
from sparsevlm.recipe.section import CrossFault, Strict


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


class VisualExpertFusion(Strict):
    """A visual expert: visual tokens have projections and FFNs of their own (CogVLM, Wang et al., arXiv:2311.03079).

    Visual tokens stand in the text, and text and visual tokens attend to each other as ever. In the chosen layers each
    linear layer has a twin that visual tokens pass instead, a copy at the start: the language model computes what it
    did. A token passes one of the two, so the twins cost memory but no arithmetic.

    The FFN's part is also to be had as experts of a MoE layer: `ffn: false` here and, in a stage, `upcycle` with
    `router.scoring: modality`.
    """

    type: Literal["visual_expert"]
    """Kind of fusion."""
    layers: LayerChoice = "all"
    """Decoder layers that have it: `all`, `alternate`, a half, or a list of indices."""
    attention: bool = True
    """Double the linear layers of the attention: queries, keys, values and its output."""
    ffn: bool = True
    """Double the FFN."""
    shared_position: bool = True
    """The visual tokens of a picture share one position. Learned tokens that a `layout` block puts before and after it
    have their own, and the one after it passes the weights of text. Frames of a video share one too, where no text
    stands between them (`video.frame_text`)."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from layer_faults(raw)
        if raw.get("attention") is False and raw.get("ffn") is False and raw.get("shared_position") is False:
            yield ("type",), "with attention, ffn and shared_position off, nothing is left of the visual expert"


Fusion = Annotated[GatedCrossAttentionFusion | VisualExpertFusion, Field(discriminator="type")]
"""What `model.fusion` may be."""
