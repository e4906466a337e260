"""The weight that a parameter stands for. Imports nothing heavy."""

from __future__ import annotations

from typing import Any


def logical_shape(parameter: Any) -> Any:
    """Return the shape of a weight: bitsandbytes packs one of 4 bits into a column of bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape
