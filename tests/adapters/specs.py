"""One small recipe section for every type of adapter, which the common tests run over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.recipe.adapter import Lora, LoraExperts, Mma, PartialLora, QLora, SliceLora
from sparsevlm.recipe.moe import Router


@dataclass(frozen=True)
class Case:
    """How the common tests use a type.

    Attributes:
        name: Of the test.
        section: For a dense model.
        sparse: For an upcycled one, where that is another.
        unreached: Parts of names that no gradient reaches, with the reason.
    """

    name: str
    section: Any
    sparse: Any = None
    unreached: tuple[tuple[str, str], ...] = ()

    @property
    def type(self) -> str:
        """Type of the adapter."""
        return self.section.type

    def on(self, upcycled: bool) -> Any:
        """Return the section for a model."""
        return self.sparse if upcycled and self.sparse is not None else self.section


SPECS: tuple[Case, ...] = (
    Case(
        "lora",
        Lora(type="lora", r=4, targets=["language", "vision"]),
        Lora(type="lora", r=4, targets=["language", "vision", "moe.experts", "moe.router"]),
    ),
    Case("dora", Lora(type="lora", r=4, dora=True, rslora=True, targets=["language", "vision"])),
    Case(
        "qlora",
        QLora(type="qlora", r=4, targets=["language", "vision"]),
        QLora(type="qlora", r=4, targets=["language", "vision", "moe.experts", "moe.router"]),
    ),
    Case(
        "int8",
        QLora(type="qlora", r=4, dora=True, quantisation="int8", targets=["language", "vision"]),
        QLora(type="qlora", r=4, quantisation="int8", targets=["language", "vision"], quantise=["language", "vision"]),
    ),
    Case("mma", Mma(type="mma", dropout=0.0)),
    Case("lora_experts", LoraExperts(type="lora_experts", r=4, router=Router(init_std=1.0))),
    Case(
        "partial_lora",
        PartialLora(type="partial_lora", r=4, alpha=8, dropout=0.0),
        unreached=tuple(
            (f"language_model.layers.1.{place}", "after the last layer nothing reads visual tokens, only their keys do")
            for place in ("self_attn.q_proj", "self_attn.o_proj", "mlp.")
        ),
    ),
    Case(
        "slice_lora",
        SliceLora(type="slice_lora", r=4, alpha=8, dropout=0.0, sets=1),
        unreached=(("default.0.", "the pictures here are whole: they pass the second set"),),
    ),
)


def stir(model: nn.Module, seed: int = 3) -> None:
    """Give every adapter parameter that starts at zero a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name) and not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
