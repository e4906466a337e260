"""Plain LoRA on linear layers, sorted to its weights without PEFT's layers, which take longer to make than to merge.

Takes only what it is sure of: options beside the few that are looked at have their defaults, PEFT's own function names
the layers, and the file holds exactly their tensors. For everything else `merge_read.py` asks PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsevlm.export.merge_deltas import Edit, Edits, LowRank

if TYPE_CHECKING:
    from sparsevlm.export.merge_base import Base

_LOOKED_AT = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout",
    "init_lora_weights",
}  # fmt: skip
"""On the weights of a trained adapter; starts that change the base were refused before."""

_TASKS = (None, "CAUSAL_LM")
"""Others may have a head that trained."""


def read_plain(config: Any, tensors: Mapping[str, Tensor], base: Base) -> Edits | None:
    """Sort an adapter's tensors, or return None where this is not plain LoRA that fits.

    Args:
        config: PEFT's, of the adapter.
        tensors: Its file.
        base: The model that it is merged into.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    ours, plain = config.to_dict(), LoraConfig().to_dict()
    odd = [key for key in ours if key not in _LOOKED_AT | _WITHOUT_EFFECT | {"task_type"} and ours[key] != plain[key]]
    targets = config.target_modules
    if odd or config.task_type not in _TASKS or not targets or targets == "all-linear":
        return None
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    by_name: dict[str, Edit] = {}
    for name, module in base.modules():
        if not name or not check_target_module_exists(config, name):
            continue
        keys = [f"base_model.model.{name}.lora_{x}.weight" for x in "AB"]
        if type(module) is not nn.Linear or any(key not in tensors for key in keys):
            return None
        a, b = (tensors[key] for key in keys)
        shape = (module.out_features, module.in_features)
        if tuple(a.shape) != (config.r, shape[1]) or tuple(b.shape) != (shape[0], config.r):
            return None
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return None
        by_name[f"{name}.weight"] = Edit(changes=[LowRank(a, b, scaling, shape)])
    return Edits.of(by_name) if 2 * len(by_name) == len(tensors) and by_name else None
