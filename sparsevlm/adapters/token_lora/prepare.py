"""Partial LoRA and slice LoRA of a recipe as PEFT's configuration."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsevlm.adapters.prepared import Prepared
from sparsevlm.adapters.targets import TargetError, resolve_targets
from sparsevlm.adapters.token_lora.config import TokenLoraConfig
from sparsevlm.moe.block import SparseMoeBlock
from sparsevlm.recipe.adapter.selective import PartialLora, SliceLora
from sparsevlm.surgery import TEXT_TWIN, in_fusion


def prepare(model: Any, spec: PartialLora | SliceLora) -> Prepared:
    """Resolve the targets of a section.

    Raises:
        TargetError: A target matches nothing, or what cannot be adapted so.
        ValueError: The tower's frames are packed, so that none is a row by itself.
    """
    if isinstance(spec, SliceLora) and model.config.vision_native is not None:
        raise ValueError(
            "slice_lora: at native resolution pictures are packed into one row of the tower, and are not cut into "
            "slices; take lora"
        )
    settings: dict[str, Any] = {"r": spec.r, "alpha": spec.alpha, "dropout": spec.dropout}
    if isinstance(spec, PartialLora):
        root, settings["choose"] = "model.language_model.", spec.tokens
    else:
        root, settings["choose"] = "model.vision_tower.", "slice"
        settings |= {"sets": spec.sets, "whole": spec.whole}
    targets = resolve_targets(model, spec.targets)
    for target in spec.targets:
        _check(model, target, root)
    config = TokenLoraConfig(**settings, target_modules=list(targets.modules))
    return Prepared(config, targets.counts, targets.modules)


def _check(model: Any, target: str, root: str) -> None:
    """Refuse a target that matches other than linear layers of the part that see all its tokens in order."""
    found = resolve_targets(model, [target])
    sparse = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SparseMoeBlock))
    for name in (*found.modules, *found.parameters):
        wrong = ""
        if not name.startswith(root):
            wrong = f"is not below {root.removesuffix('.')}; write a pattern of whole names, as {root}*{target}"
        elif in_fusion(name):
            wrong = "is what the fusion added, which does not meet each token once"
        elif TEXT_TWIN in name.split("."):
            wrong = "does not see visual tokens, which pass the visual expert beside it"
        elif sparse and name.startswith(sparse):
            wrong = "is in an MoE layer, whose experts do not see which token is which"
        elif not isinstance(model.get_submodule(name), (nn.Linear, Conv1D)):
            wrong = f"is a {type(model.get_submodule(name)).__name__}, and only linear layers can be adapted so"
        if wrong:
            raise TargetError(target, f"target {target!r} matches {name}, which {wrong}")
