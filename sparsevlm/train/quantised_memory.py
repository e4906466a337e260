"""What quantised weights cost, for `plan`; see `docs/plan.md`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsevlm.adapters.logical import logical_shape
from sparsevlm.adapters.quantise import quantised_bytes

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class QuantisedMemory:
    """Cost of a model's quantised weights.

    Attributes:
        numbers: Weights that are quantised.
        stored: Their bytes, with all constants.
        dequantised: Bytes of what is there in full precision at the same time, at most.
    """

    numbers: int
    stored: int
    dequantised: int


def quantised_memory(model: Any, *, checkpointing: bool, number_bytes: int, weight_bytes: int) -> QuantisedMemory:
    """Count quantised weights, of a model or of its marks on the meta device.

    A linear layer's weight is dequantised for one product, a stack of experts for one layer. Where LoRA adapts a stack,
    the sum of both is there beside it, and backward keeps the sum: of all layers, with gradient checkpointing of one.

    Args:
        model: With its adapter.
        checkpointing: Layers are recomputed in backward.
        number_bytes: Of a number in products.
        weight_bytes: Of a number in weights that are not quantised.
    """
    adapted = {id(module.get_param()) for module in model.modules() if hasattr(module, "parameter_name")}
    numbers = stored = largest = 0
    sums: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        size = quantised_bytes(parameter)
        if size is None:
            continue
        count = logical_shape(parameter).numel()
        numbers, stored = numbers + count, stored + size
        largest = max(largest, count * (weight_bytes if id(parameter) in adapted else number_bytes))
        if id(parameter) in adapted:
            found = _LAYER.search(name)
            layer = found[1] if found else ""
            sums[layer] = sums.get(layer, 0) + count * weight_bytes
    kept = max(sums.values(), default=0) if checkpointing else sum(sums.values())
    return QuantisedMemory(numbers, stored, largest + kept)
