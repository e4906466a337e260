"""The MoE layer that takes a dense FFN's place, and its installation in a language model.

Legend: B rows, T tokens a row, S = B * T, H width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from sparsevlm.moe.capacity import Capacity
from sparsevlm.moe.experts import MoeConfig, choose_implementation, experts_class
from sparsevlm.moe.ffn import FfnLayout, read_layout
from sparsevlm.moe.modality import SCORING as BY_MODALITY
from sparsevlm.moe.modality import ModalityRouter
from sparsevlm.moe.padding import real_tokens
from sparsevlm.moe.router import TopKRouter, mark_initialized
from sparsevlm.surgery import decoder_layers, replace_submodules, resolve_layers

__all__ = ["MoeConfig", "SparseMoeBlock", "initialize_moe", "install_moe", "moe_config"]

DEFAULT_IMPLEMENTATION = "auto"
"""Kernel where neither config nor caller names one."""


class SparseMoeBlock(nn.Module):
    """Router and experts: each token's output is the weighted sum of its k experts' outputs.

    Named and laid out as transformers' MoE layers (`gate.weight`, `experts.*`), which is also what DeepSpeed AutoEP
    looks for. Padding is not routed (`padding.leave_out_padding`): its output is 0, or that of the shared expert.

    A shared expert is an FFN that every token passes. ``gated``: its output, times the sigmoid of `shared_expert_gate`,
    is added to the experts' (Qwen2-MoE). ``residual``: `coefficient` mixes both by two numbers that sum to 1
    (DeepSpeed's residual MoE).

    Args:
        config: Shape.
        kernel_config: Object whose `_experts_implementation` names the kernel, read at every call; default: `config`.
        shared_expert: The FFN, where the config asks for one; it keeps its own dropout.

    Source: MoE-LLaVA section 3.2 with Mixtral's routing; Qwen2-MoE; DeepSpeed-MoE (arXiv:2201.05596) section 4.1.
    *Deviations*: dropless unless a capacity is set, weights renormalised for every k.
    """

    def __init__(
        self, config: MoeConfig, kernel_config: Any | None = None, shared_expert: nn.Module | None = None
    ) -> None:
        super().__init__()
        if (config.shared_expert == "none") != (shared_expert is None):
            raise ValueError(
                f"the MoE layer's config says shared_expert={config.shared_expert!r}, but it was given "
                f"{'no FFN' if shared_expert is None else type(shared_expert).__name__}"
            )
        self.gate = build_router(config)
        self.experts = experts_class(config.gated, config.bias)(kernel_config or config, config)
        self.dropout = config.dropout
        self.init_std = config.router_init_std
        self.shared = config.shared_expert
        if shared_expert is not None:
            self.shared_expert = shared_expert
            if self.shared == "gated":
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
            else:
                self.coefficient = nn.Linear(config.hidden_size, 2)
            self._initialize_mixing()

    def initialize_parameters(self) -> None:
        """Draw the weights that hold no values yet.

        Those of the shared expert are of the decoder's own kind, which its class draws.
        """
        self.gate.initialize_parameters()
        self.experts.initialize_parameters()
        self._initialize_mixing()

    def _initialize_mixing(self) -> None:
        """Draw what weighs the shared expert."""
        mixing = {"gated": "shared_expert_gate", "residual": "coefficient"}.get(self.shared)
        if mixing is None:
            return
        linear: Any = getattr(self, mixing)
        init.normal_(linear.weight, mean=0.0, std=self.init_std)
        if linear.bias is not None:
            init.zeros_(linear.bias)
        mark_initialized(linear)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``(B, T, H)`` to ``(B, T, H)``."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # (S, H)
        real = real_tokens(flat.shape[0])
        if real is None:
            _, weights, index = self.gate(flat)
            output = self.experts(flat, index, weights)  # (S, H)
        else:
            _, weights, index = self.gate(flat, real.mask)
            routed = self.experts(flat[real.index], index[real.index], weights[real.index])  # (n, H)
            output = routed.new_zeros(flat.shape).index_copy(0, real.index, routed)  # (S, H)
        output = F.dropout(output, self.dropout, self.training) if self.dropout else output
        return self._mix(flat, output).reshape(hidden_states.shape)  # (B, T, H)

    def _mix(self, flat: Tensor, routed: Tensor) -> Tensor:
        """Add the shared expert, where there is one; all ``(S, H)``."""
        if self.shared == "gated":
            return routed + self.shared_expert_gate(flat).sigmoid() * self.shared_expert(flat)
        if self.shared == "residual":
            share = self.coefficient(flat).softmax(dim=-1).to(routed.dtype)  # (S, 2); float32 under autocast
            return share[:, :1] * routed + share[:, 1:] * self.shared_expert(flat)
        return routed


def build_router(config: MoeConfig) -> TopKRouter | ModalityRouter:
    """Return the router of a MoE layer, freshly drawn."""
    if config.scoring_func == BY_MODALITY:
        return ModalityRouter()
    return TopKRouter(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        init_std=config.router_init_std,
        scoring_func=config.scoring_func,
        jitter=config.router_jitter_noise,
        balance_bias=config.bias_update_rate > 0,
        capacity=Capacity(config.capacity_factor, config.eval_capacity_factor, config.min_capacity, config.drop_policy),
    )


def moe_config(layout: FfnLayout, text_config: Any, moe: Mapping[str, Any]) -> MoeConfig:
    """Return the shape of the MoE layer that replaces an FFN.

    Args:
        layout: The dense FFN.
        text_config: Configuration of the language model.
        moe: The `moe` field of the model's config.
    """
    return MoeConfig(
        hidden_size=layout.hidden_size,
        intermediate_size=moe.get("moe_intermediate_size") or layout.intermediate_size,
        num_experts=moe["num_experts"],
        num_experts_per_tok=moe["num_experts_per_tok"],
        hidden_act=layout.hidden_act,
        gated=layout.gated,
        bias=layout.bias,
        norm_topk_prob=moe.get("norm_topk_prob", True),
        dropout=layout.dropout,
        router_init_std=moe.get("router_init_std", 0.02),
        initializer_range=getattr(text_config, "initializer_range", None) or 0.02,
        scoring_func=moe.get("scoring_func", "softmax"),
        router_jitter_noise=moe.get("router_jitter_noise", 0.0),
        bias_update_rate=moe.get("bias_update_rate", 0.0),
        capacity_factor=moe.get("capacity_factor"),
        eval_capacity_factor=moe.get("eval_capacity_factor"),
        min_capacity=moe.get("min_capacity", 4),
        drop_policy=moe.get("drop_policy", "position"),
        shared_expert=moe.get("shared_expert", "none"),
    )


def install_moe(
    language_model: nn.Module,
    text_config: Any,
    moe: Mapping[str, Any],
    experts_implementation: str | None = None,
) -> None:
    """Put MoE blocks with fresh weights in the place of the chosen layers' FFNs; for use in a model's `__init__`.

    Works on the meta device. The kernel's name is entered in the language model's config after construction, since
    a dense transformers class refuses a config that names one.

    Args:
        language_model: Dense decoder, just built.
        text_config: Its configuration.
        moe: ``{"layers": [...], "num_experts": E, "num_experts_per_tok": k, ...}``; further fields as in `moe_config`,
            and `experts_implementation`.
        experts_implementation: Kernel that goes before the one in ``moe``.

    Raises:
        ValueError: The layers or their FFNs are not what the config says, or the kernel is unknown.
    """
    missing = [key for key in ("layers", "num_experts", "num_experts_per_tok") if key not in moe]
    if missing:
        raise ValueError(f"config.moe lacks {', '.join(missing)}; it has {sorted(moe)}")
    layers = decoder_layers(language_model)
    indices = resolve_layers(moe["layers"], len(layers))
    kernel_config = getattr(language_model, "config", text_config)

    def build(_: int, ffn: nn.Module) -> SparseMoeBlock:
        config = moe_config(read_layout(ffn, text_config), text_config, moe)
        shared = None if config.shared_expert == "none" else ffn
        block = SparseMoeBlock(config, kernel_config, shared)
        weight = next(ffn.parameters())
        return block.to(device=weight.device, dtype=weight.dtype)

    replace_submodules(layers, indices, build)
    requested = experts_implementation or moe.get("experts_implementation") or DEFAULT_IMPLEMENTATION
    set_implementation(language_model, text_config, requested)


def set_implementation(language_model: nn.Module, text_config: Any, name: str) -> str:
    """Choose the experts' kernel of a language model (transformers' own setter misses blocks inside a dense class).

    Returns:
        The kernel that will run: `eager` where the sizes do not suit the one asked for.

    Raises:
        ValueError: The kernel is unknown.
    """
    blocks = [module for module in language_model.modules() if isinstance(module, SparseMoeBlock)]
    for block in blocks:
        experts: Any = block.experts
        while hasattr(experts, "base_layer"):  # an adapter stands around them
            experts = experts.base_layer
        name = choose_implementation(name, experts.hidden_dim, experts.intermediate_dim)
    for config in (text_config, getattr(language_model, "config", text_config)):
        config._experts_implementation = name
    return name


@torch.no_grad()
def initialize_moe(module: nn.Module) -> None:
    """Draw the weights of all MoE blocks below ``module`` that a checkpoint did not hold.

    transformers hands every submodule of a nested language model to that class's `_init_weights`, which does not know
    these blocks, and never calls `_init_weights` for a module of custom code that has no parameters of its own. So the
    outer model's `initialize_weights` calls this after its parent's.
    """
    for child in module.modules():
        if isinstance(child, SparseMoeBlock):
            child.initialize_parameters()
