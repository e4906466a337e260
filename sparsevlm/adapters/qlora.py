"""QLoRA of a recipe: the model is quantised in place, and adapted as by LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsevlm.adapters import lora
from sparsevlm.adapters.prepared import Prepared
from sparsevlm.adapters.quantise import Settings, quantise, require_bitsandbytes, weights_to_quantise
from sparsevlm.recipe.adapter import QLora


def prepare(model: Any, spec: QLora) -> Prepared:
    """Resolve the targets of a section, then quantise the model.

    Raises:
        ValueError: A target matches nothing (`TargetError`), cannot be adapted or quantised as asked, or bitsandbytes
            is not installed.
    """
    prepared = lora.prepare(model, spec)
    if model.device.type != "meta":
        require_bitsandbytes()
    settings = Settings(
        kind=spec.quantisation,
        double=spec.double_quant and spec.quantisation != "int8",
        compute_dtype=spec.compute_dtype,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights_to_quantise(model, spec.quantise),
    )
    return replace(prepared, quantised=quantise(model, settings))
