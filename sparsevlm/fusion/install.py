"""Putting a fusion into a language model, from what the model's config says."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from torch import nn

from sparsevlm.fusion.cross_attention import NAME as CROSS_ATTENTION
from sparsevlm.fusion.cross_attention import GatedCrossAttention
from sparsevlm.fusion.visual_expert import install_experts
from sparsevlm.moe.router import mark_initialized
from sparsevlm.recipe.fusion import Fusion, GatedCrossAttentionFusion, VisualExpertFusion
from sparsevlm.surgery import decoder_layers, prepend_to_layers, resolve_layers

_FUSION: TypeAdapter[GatedCrossAttentionFusion | VisualExpertFusion] = TypeAdapter(Fusion)


def fusion_spec(fusion: dict[str, Any] | None) -> GatedCrossAttentionFusion | VisualExpertFusion | None:
    """Return the section that a config's `fusion` field says.

    Raises:
        pydantic.ValidationError: It says none.
    """
    return None if fusion is None else _FUSION.validate_python(fusion)


def media_apart(fusion: dict[str, Any] | None) -> bool:
    """Tell whether media stay beside the text, with one token of the prompt for each medium."""
    return fusion is not None and fusion["type"] == "gated_cross_attention"


def check_fusion(fusion: dict[str, Any] | None, layers: int) -> None:
    """Refuse a fusion that a decoder of so many layers has no place for.

    Raises:
        ValueError: It is one.
    """
    spec = fusion_spec(fusion)
    if isinstance(spec, GatedCrossAttentionFusion) and spec.every > layers:
        raise ValueError(
            f"fusion: a block before every {spec.every}th layer, but the language model has {layers} layers; set "
            f"model.fusion.every to {layers} or less"
        )
    if isinstance(spec, VisualExpertFusion):
        resolve_layers(spec.layers, layers)


def install_fusion(
    language_model: nn.Module, text_config: Any, fusion: dict[str, Any] | None, media_dim: int | None = None
) -> None:
    """Add what a fusion needs to a decoder, with fresh weights; for use in a model's `__init__`.

    Works on the meta device. The decoder computes what it did before, but for positions that are shared.

    Args:
        language_model: Decoder, just built or loaded; its MoE blocks are there already.
        text_config: Its configuration.
        fusion: The `fusion` field of the model's config; None adds nothing.
        media_dim: Width of the visual tokens where they stay beside the text.

    Raises:
        ValueError: The decoder has no layer for it.
    """
    spec = fusion_spec(fusion)
    if spec is None:
        return
    if isinstance(spec, VisualExpertFusion):
        install_experts(language_model, spec)
        return
    assert media_dim is not None
    layers = decoder_layers(language_model)
    check_fusion(fusion, len(layers))
    indices = list(range(spec.every - 1, len(layers), spec.every))

    def build(index: int, layer: nn.Module) -> nn.Module:
        block = GatedCrossAttention(text_config.hidden_size, media_dim, index, spec.heads, spec.head_dim, spec.ff_mult)
        weight = next(layer.parameters())
        block = block.to(device=weight.device, dtype=weight.dtype)
        mark_initialized(block)
        return block

    prepend_to_layers(layers, indices, CROSS_ATTENTION, build)


def initialize_fusion(module: nn.Module) -> None:
    """Draw the weights of all fusion modules below a module that a checkpoint did not hold."""
    for child in module.modules():
        if isinstance(child, GatedCrossAttention):
            child.initialize_parameters()
