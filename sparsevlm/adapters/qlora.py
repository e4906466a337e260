"""QLoRA of a recipe: the model is quantised in place, and adapted as by LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparsevlm.adapters import lora
from sparsevlm.adapters.prepared import Prepared
from sparsevlm.adapters.quantise import BLOCK, Settings, quantise, require_bitsandbytes, weights_to_quantise
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
    weights = weights_to_quantise(model, spec.quantise)
    if spec.dora and spec.quantisation != "int8":
        _check_dora(model, weights, prepared.modules)
    settings = Settings(
        kind=spec.quantisation,
        double=spec.double_quant and spec.quantisation != "int8",
        compute_dtype=spec.compute_dtype,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights,
    )
    return replace(prepared, quantised=quantise(model, settings))


def _check_dora(model: Any, weights: Sequence[str], adapted: Sequence[str]) -> None:
    """Refuse weights whose lengths PEFT would take from what bitsandbytes dequantises wrongly on CPUs."""
    for name in weights:
        width = model.get_parameter(name).shape[-1]
        if width % BLOCK and name.removesuffix(".weight") in adapted:
            raise ValueError(
                f"'dora' measures the rows of {name} in 4 bits, which bitsandbytes dequantises wrongly on CPUs where "
                f"rows are no multiple of {BLOCK} wide (here {width}); use 'quantisation: int8', or leave out 'dora'"
            )
