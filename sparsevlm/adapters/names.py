"""What the names of parameters say about adapters. Imports nothing heavy."""

from __future__ import annotations

PREFIXES: tuple[str, ...] = ("lora_", "mma_")
"""How the modules begin that adapters of each method add, as in PEFT's tables."""

_MARKS = tuple(f".{prefix}" for prefix in PREFIXES)


def is_adapter_parameter(name: str) -> bool:
    """Tell whether a parameter belongs to an adapter."""
    return any(mark in f".{name}" for mark in _MARKS)


def without_wrappers(name: str) -> str:
    """Return the name that a parameter has without an adapter around its module."""
    return name.replace(".base_layer", "")
