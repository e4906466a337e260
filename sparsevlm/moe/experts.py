"""The experts of a layer, stacked as transformers stacks them, so that its kernels, PEFT and DeepSpeed take them.

Legend: S tokens, H width, I intermediate width, E experts, k experts a token.

Gated experts hold `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I); plain ones `up_proj` (E, I, H) and `down_proj`;
with biases also `gate_up_proj_bias` (E, 2I) or `up_proj_bias` (E, I), and `down_proj_bias` (E, H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.utils import logging

from sparsevlm.moe.backends import ALIGNMENT
from sparsevlm.moe.router import mark_initialized

logger = logging.get_logger(__name__)

_CHOICES = {
    "scoring_func": ("softmax", "topk_softmax", "sigmoid", "modality"),
    "drop_policy": ("position", "probability"),
    "shared_expert": ("none", "residual", "gated"),
}
"""Fields of `MoeConfig` that are words, and the words."""


@dataclass(frozen=True)
class MoeConfig:
    """Shape of one MoE layer.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        num_experts_per_tok: k.
        hidden_act: Activation, a name of transformers' `ACT2FN`.
        gated: Experts are gate / up / down, else up / down.
        bias: Projections have biases.
        norm_topk_prob: Renormalise the chosen probabilities (upcycling preserves the function only then).
        dropout: Dropout on the layer's output, where the dense FFN had one.
        router_init_std: Standard deviation of fresh router weights.
        initializer_range: Standard deviation of fresh expert weights.
        experts_implementation: Kernel, where no model config says otherwise.
        scoring_func: ``softmax``, ``topk_softmax`` or ``sigmoid``, see `TopKRouter`; ``modality``, see
            `ModalityRouter`.
        router_jitter_noise: Half width of the random factors on the router's input in training.
        bias_update_rate: Step of the balance bias; 0: there is none.
        capacity_factor: Tokens that an expert takes in training, over its fair share; None: all.
        eval_capacity_factor: The same outside training.
        min_capacity: Tokens that an expert takes at least.
        drop_policy: Whom a full expert turns away, by ``position`` or by ``probability``.
        shared_expert: FFN that every token passes: ``none``, ``residual`` or ``gated``; see `SparseMoeBlock`.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    hidden_act: str = "silu"
    gated: bool = True
    bias: bool = False
    norm_topk_prob: bool = True
    dropout: float = 0.0
    router_init_std: float = 0.02
    initializer_range: float = 0.02
    experts_implementation: str = "eager"
    scoring_func: str = "softmax"
    router_jitter_noise: float = 0.0
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    drop_policy: str = "position"
    shared_expert: str = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be between 1 and the {self.num_experts} "
                "experts"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.scoring_func == "modality" and (self.num_experts, self.num_experts_per_tok) != (2, 1):
            raise ValueError(
                f"scoring_func is 'modality' with {self.num_experts} experts, {self.num_experts_per_tok} a token; it "
                "takes 2, one for text and one for visual tokens, and 1 a token"
            )
        if self.bias_update_rate and self.scoring_func != "sigmoid":
            raise ValueError(
                f"bias_update_rate is {self.bias_update_rate} but scoring_func is {self.scoring_func!r}: a balance "
                "bias needs 'sigmoid'"
            )

    @property
    def _experts_implementation(self) -> str:
        """Name under which transformers' dispatch looks for the kernel."""
        return self.experts_implementation


class Experts(nn.Module):
    """Parameters and eager body; the body is the specification that every kernel is tested against."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[Tensor], Tensor]

    def __init__(self, config: Any, moe: MoeConfig) -> None:
        """Build uninitialised stacks and draw their values.

        Args:
            config: Object whose `_experts_implementation` names the kernel, read at every call.
            moe: Shape.
        """
        super().__init__()
        self.num_experts = moe.num_experts
        self.hidden_dim = moe.hidden_size
        self.intermediate_dim = moe.intermediate_size
        self.initializer_range = moe.initializer_range
        self.act_fn = ACT2FN[moe.hidden_act]
        self.up_name = "gate_up_proj" if moe.gated else "up_proj"
        width = (2 if moe.gated else 1) * moe.intermediate_size
        shapes = {
            self.up_name: (width, moe.hidden_size),
            "down_proj": (moe.hidden_size, moe.intermediate_size),
        }
        if moe.bias:
            shapes |= {f"{self.up_name}_bias": (width,), "down_proj_bias": (moe.hidden_size,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(moe.num_experts, *shape)))
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw weights and zero biases, except those that already hold values."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.initializer_range)
        mark_initialized(self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each token through its experts and add their outputs up, in the type of the weights.

        Args:
            hidden_states: ``(S, H)``.
            top_k_index: ``(S, k)`` experts of each token.
            top_k_weights: ``(S, k)`` float32.

        Returns:
            ``(S, H)`` in the type of ``hidden_states``.
        """
        # By attribute: adapters put a computed tensor in the place of a parameter.
        up, down = (getattr(self, name) for name in (self.up_name, "down_proj"))
        up_bias, down_bias = getattr(self, f"{self.up_name}_bias", None), getattr(self, "down_proj_bias", None)
        output = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)  # (S, H)
        for expert in range(self.num_experts):  # also those without a token: every rank must touch every parameter
            token, slot = torch.where(top_k_index == expert)  # (s,), (s,)
            x = F.linear(hidden_states[token], up[expert], None if up_bias is None else up_bias[expert])  # (s, I | 2I)
            x = self._apply_gate(x) if self.has_gate else self.act_fn(x)  # (s, I)
            x = F.linear(x, down[expert], None if down_bias is None else down_bias[expert])  # (s, H)
            output.index_add_(0, token, (x * top_k_weights[token, slot, None]).to(output.dtype))
        return output.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Describe the stack in `print(model)`."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_dim}, "
            f"intermediate_size={self.intermediate_dim}, gated={self.has_gate}, bias={self.has_bias}"
        )


class _Cast:
    """Experts as a kernel sees them under autocast: parameters in the autocast type, all else as it is."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter | Tensor) else value


class _AutocastInterface(ExpertsInterface):
    """transformers' kernels, made to follow autocast, or the type that quantised experts are to compute in.

    `grouped_mm` is not an autocast operation: over float32 weights it would quietly compute in float32.
    """

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        kernel = super().get_interface(experts_implementation, default)

        def run(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            device = hidden_states.device.type
            chosen = getattr(experts, "compute_dtype", None)
            if chosen is not None:
                with torch.autocast(device, enabled=False):
                    output = kernel(_Cast(experts, chosen), hidden_states.to(chosen), top_k_index, top_k_weights)
                return output.to(hidden_states.dtype)
            if kernel is default:  # the eager body: `linear` follows autocast by itself
                return kernel(experts, hidden_states, top_k_index, top_k_weights)
            if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
                return kernel(experts, hidden_states, top_k_index, top_k_weights)
            dtype = torch.get_autocast_dtype(device)
            return kernel(_Cast(experts, dtype), hidden_states.to(dtype), top_k_index, top_k_weights)

        return run


@cache
def experts_class(gated: bool, bias: bool) -> type[Experts]:
    """Return the class for one kind of FFN: transformers' decorator fixes gate and bias for a whole class."""
    name = ("Gated" if gated else "Plain") + ("Bias" if bias else "") + "Experts"
    kind = type(name, (Experts,), {"__module__": __name__, "__doc__": Experts.__doc__})
    return use_experts_implementation(experts_interface=_AutocastInterface(), has_gate=gated, has_bias=bias)(kind)  # pyright: ignore


for _gated in (True, False):
    for _bias in (True, False):
        # Now, and not first while a sharded model is loaded: DeepSpeed's zero.Init would put back the constructor of
        # the base class when it is done, and with it undo the decorator.
        experts_class(_gated, _bias)


def choose_implementation(name: str, hidden_size: int, intermediate_size: int) -> str:
    """Return the kernel to use, given the one asked for.

    `auto` stays `auto`: it chooses at every call. A package that a kernel needs is looked for when the kernel first
    runs, so that a model can be planned, loaded and exported where it is missing.

    Raises:
        ValueError: No kernel of that name is registered with transformers.
    """
    known = ["auto", "eager", *sorted({*ExpertsInterface().valid_keys()} - {"auto"})]
    if name not in known:
        raise ValueError(f"unknown experts implementation {name!r}; known are {', '.join(known)}")
    if name == "grouped_mm" and (hidden_size % ALIGNMENT or intermediate_size % ALIGNMENT):
        logger.warning_once(
            f"grouped_mm needs hidden and intermediate sizes that are multiples of {ALIGNMENT}, got {hidden_size} and "
            f"{intermediate_size}: experts run with 'eager' instead"
        )
        return "eager"
    return name
