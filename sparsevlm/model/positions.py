"""Rotary positions of the language model, stretched for longer text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration


def rope_fault(text_config: Any) -> str:
    """Return why a language model's positions cannot be stretched; nothing where they can."""
    rope: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        return f"language model {text_config.model_type!r} has no rotary positions of one kind, which rope_factor needs"
    if rope.get("rope_type", "default") not in ("default", "linear"):
        return (
            f"the language model's rotary positions are scaled by {rope['rope_type']!r}; rope_factor is linear scaling"
        )
    return ""


def stretch_positions(model: SparseVLMForConditionalGeneration, factor: float) -> None:
    """Divide the rotary positions of a model's language model by a factor, on top of what it has already.

    A text of `factor` times the length then turns its vectors as far as the longest that the model was trained on
    (position interpolation, Chen et al., arXiv:2306.15595). The configuration carries it to what is saved.

    Raises:
        ValueError: The language model has no rotary positions, or scales them in another way.
    """
    decoder: Any = model.model.language_model
    text: Any = model.config.text_config
    if fault := rope_fault(text):
        raise ValueError(fault)
    before = text.rope_parameters.get("factor", 1.0)
    for config in {id(each): each for each in (text, decoder.config)}.values():
        config.rope_parameters = config.rope_parameters | {"rope_type": "linear", "factor": before * factor}
        config.max_position_embeddings = round(config.max_position_embeddings * factor)
    device = next(decoder.parameters()).device
    for module in list(decoder.modules()):
        if hasattr(module, "rotary_emb"):
            fresh = type(module.rotary_emb)(decoder.config).to(device)
            for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):  # of a fusion that shares positions
                setattr(fresh, hooks, getattr(module.rotary_emb, hooks))
            module.rotary_emb = fresh
