"""CogVLM's visual expert: in chosen layers, visual tokens have projections and an FFN of their own.

Legend: B rows, T tokens a row, S = B * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from sparsevlm.fusion.positions import share_positions
from sparsevlm.moe.modality import modalities
from sparsevlm.moe.router import mark_initialized
from sparsevlm.recipe.fusion import VisualExpertFusion
from sparsevlm.surgery import FUSION_MODULES, TEXT_TWIN, decoder_layers, replace_submodules, resolve_layers

ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
"""Names that transformers gives a layer's attention."""

assert FUSION_MODULES[1] == "visual_expert" and TEXT_TWIN == "text_expert"  # attributes below


class ByModality(nn.Module):
    """A module that maps tokens one by one, and its twin for visual tokens, which starts as a copy.

    Each token passes one of the two: rows are gathered, mapped and put back. In training both run in every pass, be it
    on no token, since sharded ranks wait for each other.

    Args:
        text: Linear layer or FFN of the language model.

    Raises:
        ValueError: See `_twin`.

    Source: Wang et al. 2023 (CogVLM, arXiv:2311.03079), section 2.1, and its code.
    """

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text_expert = text
        self.visual_expert = _twin(text)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, ·)``.

        Raises:
            ValueError: See `modalities`.
        """
        flat = x.flatten(0, -2)  # (S, ·)
        found = modalities(flat.shape[0])
        sharded = hasattr(next(self.parameters()), "ds_id")
        if not (found.visual.numel() or torch.is_grad_enabled() or sharded):
            return self.text_expert(x)
        visual, text = found.visual.to(x.device), found.text.to(x.device)
        of_text, of_visual = self.text_expert(flat[text]), self.visual_expert(flat[visual])
        out = of_text.new_zeros(flat.shape[0], of_text.shape[-1])
        out = out.index_copy(0, text, of_text).index_copy(0, visual, of_visual.to(out.dtype))
        return out.unflatten(0, x.shape[:-1])


def install_experts(language_model: nn.Module, spec: VisualExpertFusion) -> None:
    """Give layers of a decoder a visual expert, in place.

    Args:
        language_model: Decoder; its MoE blocks are there already.
        spec: What is doubled, and where.

    Raises:
        ValueError: Unknown layers, one without an attention or FFN that can have a twin, or positions that cannot be
            shared.
    """
    layers = decoder_layers(language_model)
    indices = resolve_layers(spec.layers, len(layers))
    attentions = [_attention(layers[index], index) for index in indices] if spec.attention else []
    rotary = getattr(language_model, "rotary_emb", None)
    if spec.shared_position and not isinstance(rotary, nn.Module):
        raise ValueError(
            f"fusion: {type(language_model).__name__} has no rotary embedding of its own, so the visual tokens of a "
            "picture cannot share a position; set model.fusion.shared_position: false"
        )
    if spec.ffn:
        _double_ffns(layers, indices)
    for attention in attentions:
        for name, child in list(attention.named_children()):
            if isinstance(child, nn.Linear):
                setattr(attention, name, ByModality(child))
    if spec.shared_position:
        assert isinstance(rotary, nn.Module)
        share_positions(rotary)


def _attention(layer: nn.Module, index: int) -> nn.Module:
    """Return a layer's attention, which has linear layers.

    Raises:
        ValueError: It has none.
    """
    children = dict(layer.named_children())
    found = next((children[name] for name in ATTENTIONS if name in children), None)
    if found is None or not any(isinstance(child, nn.Linear) for child in found.children()):
        raise ValueError(
            f"fusion: decoder layer {index} ({type(layer).__name__}) has no attention with linear layers to double: it "
            f"has {list(children)}; leave the layer out of model.fusion.layers, or set model.fusion.attention: false"
        )
    return found


def _double_ffns(layers: nn.ModuleList, indices: Sequence[int]) -> None:
    """Give the FFNs of layers their twins."""

    def double(index: int, ffn: nn.Module) -> nn.Module:
        try:
            return ByModality(ffn)
        except ValueError as error:
            raise ValueError(
                f"fusion: decoder layer {index}: {error}; leave the layer out of model.fusion.layers, or set "
                "model.fusion.ffn: false"
            ) from None

    replace_submodules(layers, indices, double)


def _twin(module: nn.Module) -> nn.Module:
    """Return a copy with weights of its own; linear layers are made anew, so that a sharded start shards them too.

    Raises:
        ValueError: It holds weights of other kinds.
    """
    if isinstance(module, nn.Linear):
        weight: Any = module.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        with no_init_weights():
            fresh = nn.Linear(module.in_features, module.out_features, module.bias is not None, **options)
        if not weight.is_meta and not hasattr(weight, "ds_id"):  # else the checkpoint that is read next has them
            fresh.load_state_dict(module.state_dict())
            mark_initialized(fresh)
        return fresh
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if own:
        raise ValueError(
            f"{type(module).__name__} holds {', '.join(own)} besides linear layers (is it a routed FFN?), and cannot "
            "have a twin for visual tokens"
        )
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    twin.__dict__.update({key: value for key, value in vars(module).items() if key not in vars(twin)})
    twin.train(module.training)
    for name, child in module.named_children():
        twin.add_module(name, _twin(child))
    return twin
