"""A mixture of LoRA experts on an FFN, as layers of PEFT: the router around the FFN, the experts at its linear layers.

Legend: S tokens, E experts, k experts a token, r rank, H width of the FFN's input, I and O widths of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsevlm.adapters.lora_experts.config import LoraExpertsConfig, group_name
from sparsevlm.moe.capacity import Capacity
from sparsevlm.moe.padding import real_tokens
from sparsevlm.moe.router import TopKRouter

MERGE_REFUSED = (
    "a mixture of LoRA experts cannot be merged: which experts a token passes depends on the token, so no one weight "
    "matrix does what it does. Keep it beside the base model: save_pretrained writes it, PeftModel.from_pretrained "
    "loads it, unload() gives the base model back"
)

_WEIGHTS: ContextVar[tuple[str, Tensor] | None] = ContextVar("sparsevlm_lora_experts", default=None)
"""Adapter that runs and the tokens' weights ``(S, E)``, set while an FFN runs."""


class ExpertStack(nn.Module):
    """One matrix of each expert, ``weight`` (E, r, width); all of them multiply as one. Called, as sharding wants it.

    Args:
        weight: Its start.
        down: Map ``(..., width)`` to ``(..., E r)``; else back.
    """

    def __init__(self, weight: Tensor, down: bool) -> None:
        super().__init__()
        self.down = down
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        weight = self.weight.flatten(0, 1)  # (E r, width)
        return F.linear(x, weight) if self.down else x @ weight.to(x.dtype)


class LoraExpertsLinear(nn.Module, BaseTunerLayer):
    """A linear layer of an FFN with its part of each expert: ``W x + s * sum_e w_e B_e A_e dropout(x)``.

    The weights w come from the router of the FFN around it, 0 for experts that the token does not go to. All experts'
    A are one matrix and so are all B; the weights stand between the two. That multiplies E low-rank pairs where k would
    do, and is still the faster way by far (measured in docs/adapters.md): gathering tokens by expert moves k copies of
    them, I wide, to save products of rank r.

    Args:
        base_layer: `nn.Linear`, a quantised kin of it, or `Conv1D`.
        adapter_name: Name of the adapter.
        config: Its settings.
    """

    adapter_layer_names = ("mole_A", "mole_B")
    other_param_names = ("mole_settings",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraExpertsConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mole_A, self.mole_B = nn.ModuleDict(), nn.ModuleDict()
        self.mole_settings: dict[str, LoraExpertsConfig] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoraExpertsConfig) -> None:
        """Add an adapter: A as PEFT's LoRA draws it, expert by expert, B zero."""
        inputs, outputs = linear_shape(self.base_layer)
        down = torch.empty(config.num_experts, config.r, inputs)
        nn.init.kaiming_uniform_(down.view(-1, inputs), a=math.sqrt(5))
        self.mole_A[adapter_name] = ExpertStack(down, down=True)
        self.mole_B[adapter_name] = ExpertStack(torch.zeros(config.num_experts, config.r, outputs), down=False)
        self.mole_settings[adapter_name] = config
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)``."""
        output = self.base_layer(x, *args, **kwargs)
        running = _WEIGHTS.get()
        if running is None:
            return output
        name, weights = running
        config = self.mole_settings[name]
        down: Any = self.mole_A[name]
        inner = F.dropout(x.to(down.weight.dtype), config.lora_dropout, self.training)
        hidden = down(inner).reshape(-1, config.num_experts, config.r)  # (S, E, r)
        assert hidden.shape[0] == weights.shape[0], f"{tuple(x.shape)} for {weights.shape[0]} tokens"
        hidden = hidden * (config.scaling * weights).to(hidden.dtype)[..., None]  # (S, E, r)
        added = self.mole_B[name](hidden.flatten(1))  # (S, O)
        return output + added.view(output.shape).to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see `MERGE_REFUSED`."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Refuse, as nothing was merged."""
        raise ValueError(MERGE_REFUSED)


class LoraExpertsFfn(nn.Module, BaseTunerLayer):
    """An FFN whose router sends each token to k LoRA experts; the FFN itself runs once, frozen.

    One router reads the FFN's input, and all linear layers of the FFN share its choice and its weights: expert e is the
    e-th addition in each of them. B starts at zero, so the FFN starts as it was, to the bit.

    Padding is not routed (`moe.padding`): nothing is added to it.

    Args:
        base_layer: FFN of a decoder layer; its first argument, or ``hidden_states``, is ``(..., H)``.
        adapter_name: Name of the adapter.
        config: Its settings.
        hidden_size: H.
        path: Name of the FFN in the model.

    Source: LLaVA-MoLE (arXiv:2401.16160) section 3: experts in the linear layers, one router an FFN. The router and its
    losses are those of our MoE layers. *Deviations*: k experts, weighted, where it takes the best one (LoRAMoE,
    arXiv:2312.09979, and MixLoRA, arXiv:2404.15159, weigh several). MixLoRA's experts are whole FFNs, weighted after
    the projection back; that costs k passes through most of the FFN, and is not offered.
    """

    adapter_layer_names = ("mole_router",)
    other_param_names = ("mole_settings",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraExpertsConfig, *, hidden_size: int, path: str
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hidden_size, self.path = hidden_size, path
        self.mole_router = nn.ModuleDict()
        self.mole_settings: dict[str, LoraExpertsConfig] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoraExpertsConfig) -> None:
        """Add an adapter, freshly initialised, here and at the linear layers, and make it the active one."""
        router = TopKRouter(
            self.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            init_std=config.router_init_std if config.router_init == "normal" else 0.0,
            scoring_func=config.scoring_func,
            jitter=config.router_jitter_noise,
            balance_bias=config.bias_update_rate > 0,
            capacity=Capacity(
                config.capacity_factor, config.eval_capacity_factor, config.min_capacity, config.drop_policy
            ),
            group=group_name(adapter_name),
        )
        self.mole_router[adapter_name] = router
        self.mole_settings[adapter_name] = config
        for name, linear in linears(self.base_layer):
            if isinstance(linear, LoraExpertsLinear):
                linear.update_layer(adapter_name, config)
            else:
                setattr(self.base_layer, name, LoraExpertsLinear(linear, adapter_name, config))
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def active(self) -> str | None:
        """Return the name of the adapter that runs, None where none does.

        Raises:
            ValueError: More than one is active.
        """
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.mole_router]
        if len(names) > 1:
            raise ValueError(
                f"lora_experts: {self.path} has {len(names)} active adapters ({', '.join(names)}), but one runs at a "
                "time: choose it with set_adapter"
            )
        return names[0] if names else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Route the tokens, and run the FFN with what their experts add."""
        name = self.active()
        if name is None:
            return self.base_layer(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # (S, H)
        real = real_tokens(flat.shape[0])
        logits, weights, index = self.mole_router[name](flat, None if real is None else real.mask)
        with _routed(name, torch.zeros_like(logits).scatter(1, index, weights)):  # (S, E); dropped ones weigh 0
            return self.base_layer(*args, **kwargs)

    @torch.no_grad()
    def expert_cosines(self) -> tuple[str, Tensor] | None:
        """Return the group of the active routers and the cosine between what every two experts add, ``(E, E)``.

        An expert is one vector of its products ``B_e A_e`` in all linear layers. These need not be multiplied out:
        ``<B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))``. Zero where B still is.
        """
        name = self.active()
        if name is None:
            return None
        gram: Any = 0.0
        for _, linear in linears(self.base_layer):
            assert isinstance(linear, LoraExpertsLinear)
            stacks: Any = (linear.mole_A[name], linear.mole_B[name])
            down, up = (stack.weight.detach().double().flatten(0, 1) for stack in stacks)
            experts, rank = self.mole_settings[name].num_experts, self.mole_settings[name].r
            product = (down @ down.T) * (up @ up.T)  # (E r, E r)
            gram = gram + product.view(experts, rank, experts, rank).sum((1, 3))
        norm = gram.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
        return group_name(name), (gram / norm / norm[:, None]).cpu()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the FFN as it was.

        Raises:
            ValueError: Merging is asked for.
        """
        if merge:
            self.merge()
        for name, linear in list(linears(self.base_layer)):
            if isinstance(linear, LoraExpertsLinear):
                setattr(self.base_layer, name, linear.base_layer)
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see `MERGE_REFUSED`."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Refuse, as nothing was merged."""
        raise ValueError(MERGE_REFUSED)


@contextmanager
def _routed(name: str, weights: Tensor) -> Iterator[None]:
    """Tell the linear layers that run inside which experts their tokens go to."""
    token = _WEIGHTS.set((name, weights))
    try:
        yield
    finally:
        _WEIGHTS.reset(token)


def linears(ffn: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of an FFN by name, adapted or not."""
    for name, child in ffn.named_children():
        if isinstance(child, nn.Linear | Conv1D | LoraExpertsLinear):
            yield name, child


def linear_shape(linear: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer."""
    if isinstance(linear, Conv1D):
        return tuple(getattr(linear.weight, "ds_shape", linear.weight.shape))  # pyright: ignore
    return linear.in_features, linear.out_features
