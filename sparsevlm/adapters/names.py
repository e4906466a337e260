"""What the names of parameters say about adapters. Imports nothing heavy."""

from __future__ import annotations

import re

PREFIXES: tuple[str, ...] = ("lora_", "mma_", "mole_", "loras_")
"""How the modules begin that adapters of each method add, as in PEFT's tables."""

_MARKS = tuple(f".{prefix}" for prefix in PREFIXES)


def is_adapter_parameter(name: str) -> bool:
    """Tell whether a parameter belongs to an adapter."""
    return any(mark in f".{name}" for mark in _MARKS)


def without_wrappers(name: str) -> str:
    """Return the name that a parameter has without an adapter around its module."""
    return name.replace(".base_layer", "")


_ROUTED = re.compile(r"\.mole_[AB]\.(?P<adapter>[^.]+)\.weight$")


def routed_adapter(name: str) -> str | None:
    """Return the adapter whose LoRA experts a parameter stacks, ``(E, ...)``; None for any other parameter."""
    found = _ROUTED.search(name)
    return found["adapter"] if found else None
