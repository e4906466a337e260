"""LoRA on some experts of a stack: the others have no A and B at all, and stay as they are to the bit.

Legend: E experts of the stack, C chosen ones, r rank, I inputs, O outputs.

PEFT's `ParamWrapper` adapts every expert of a stack: `lora_A` (E r, I) with the expert outermost and `lora_B` (O, r E)
with it innermost. Here both hold the chosen experts only while training, so nothing else trains, decays or counts. What
is saved has zeros for the rest, in PEFT's own layout, so that PEFT alone loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

NAME = "default"


class ChosenExperts(ParamWrapper):
    """PEFT's layer around a stack, with an A and a B for the experts in `chosen` only."""

    chosen: tuple[int, ...]

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return what multiplies to the change of the chosen experts, ``(C, ., r)`` and ``(C, r, .)``."""
        layers: Any = (self.lora_A[adapter_name], self.lora_B[adapter_name])
        a, b = (layer.weight for layer in layers)
        a = a.reshape(len(self.chosen), -1, a.shape[-1])  # (C, r, I)
        b = b.reshape(b.shape[0], -1, len(self.chosen)).permute(2, 0, 1)  # (C, O, r)
        return (b, a) if self._did_swap_in_out_features else (a.mT, b.mT)

    def _spread(self, compact: Tensor) -> Tensor:
        """Return ``(C, ...)`` as ``(E, ...)``, with zeros for the experts that are not chosen."""
        index = torch.tensor(self.chosen, device=compact.device)
        return compact.new_zeros(self.num_experts, *compact.shape[1:]).index_copy(0, index, compact)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Return ``lhs``, ``rhs`` and the scaling whose product is the change of the stack."""
        dtype = self.get_param().dtype
        lhs, rhs = (self._spread(factor).to(dtype) for factor in self._factors(adapter_name))
        return lhs, rhs, self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return the change of the stack; exact zeros for the experts that are not chosen."""
        lhs, rhs = self._factors(adapter_name)
        return self._spread(lhs @ rhs * self.scaling[adapter_name]).to(self.get_param().dtype)


def choose_experts(model: nn.Module, chosen: Sequence[int]) -> None:
    """Leave an A and a B to the chosen experts of every adapted stack, in place; also on the meta device.

    They keep the values that they were drawn with.
    """
    for stack in model.modules():
        if not isinstance(stack, ParamWrapper) or stack.num_experts == 1:
            continue
        stack.__class__ = ChosenExperts
        module: Any = stack
        module.chosen = tuple(sorted(chosen))
        a, b = module.lora_A[NAME].weight, module.lora_B[NAME].weight
        index = torch.tensor(module.chosen, device=a.device)
        a = a.detach().reshape(module.num_experts, -1, a.shape[-1]).index_select(0, index).flatten(0, 1)
        b = b.detach().reshape(b.shape[0], -1, module.num_experts).index_select(2, index).flatten(1)
        for linear, weight in ((module.lora_A[NAME], a), (module.lora_B[NAME], b)):
            linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            linear.out_features, linear.in_features = weight.shape


def whole_stacks(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's names with zeros for the experts that are not chosen."""
    whole = dict(tensors)
    for name, stack in model.named_modules():
        if not isinstance(stack, ChosenExperts):
            continue
        module: Any = stack
        index = torch.tensor(module.chosen)
        a, b = (whole[f"{name}.lora_{matrix}.weight"].detach().cpu() for matrix in "AB")
        a = a.reshape(len(index), -1, a.shape[-1])  # (C, r, I)
        b = b.reshape(b.shape[0], -1, len(index))  # (O, r, C)
        a = a.new_zeros(module.num_experts, *a.shape[1:]).index_copy(0, index, a)
        b = b.new_zeros(*b.shape[:2], module.num_experts).index_copy(2, index, b)
        whole[f"{name}.lora_A.weight"], whole[f"{name}.lora_B.weight"] = a.flatten(0, 1), b.flatten(1)
    return whole
