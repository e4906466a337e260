"""The router: which experts a token goes to, and with which weights.

Legend: S tokens of the whole batch, H width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

_COLLECTOR: ContextVar[tuple[list[Tensor], bool] | None] = ContextVar("sparsevlm_router_logits", default=None)


@contextmanager
def collect_router_logits() -> Iterator[list[Tensor]]:
    """Collect the raw logits of every router that runs inside the block.

    Nothing stays on a module: recomputation under gradient checkpointing would read, or write, the wrong call's.

    Yields:
        List that each router appends its ``(S, E)`` float32 logits to, in layer order, gradient attached.

    Raises:
        ValueError: A router ran without gradient although gradients are on: reentrant checkpointing, which would
            silently drop the auxiliary loss's gradient.
    """
    collected: list[Tensor] = []
    token = _COLLECTOR.set((collected, torch.is_grad_enabled()))
    try:
        yield collected
    finally:
        _COLLECTOR.reset(token)


def _record(logits: Tensor, differentiable: bool) -> None:
    """Hand logits to the collector that is active, if any."""
    active = _COLLECTOR.get()
    # Inside a backward pass this is a recomputation: the first forward has recorded these logits already.
    if active is None or torch._C._current_graph_task_id() != -1:
        return
    collected, grad_enabled = active
    if grad_enabled and differentiable and not torch.is_grad_enabled():
        raise ValueError(
            "router logits are computed without gradient: reentrant gradient checkpointing would silently drop the "
            "load-balancing gradient; use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    collected.append(logits)


def select_experts(logits: Tensor, top_k: int) -> Tensor:
    """Return the ``(S, k)`` indices of the largest logits ``(S, E)``, best first, ties to the lower index.

    A stable sort, since `torch.topk` leaves the order of ties to the kernel.
    """
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]


def mark_initialized(module: nn.Module) -> None:
    """Flag parameters that hold values, as transformers does: its `init` functions then leave them alone.

    The flag must not be set on the meta device, where `from_pretrained` builds: it would hide that a weight is missing.
    """
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter._is_hf_initialized = True  # pyright: ignore


class TopKRouter(nn.Module):
    """Linear router in float32: softmax over all experts, the best k, renormalised.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: k.
        norm_topk_prob: Divide the chosen probabilities by their sum. Only then does a layer of identical experts equal
            the dense layer; with k = 1 the weight is then always 1 and only the balancing loss trains the router.
        init_std: Standard deviation of fresh weights.

    Source: Mixtral's router (transformers), MoE-LLaVA section 3.2. *Deviations*: ties go to the lower index; no
    capacity, no noise.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, norm_topk_prob: bool = True, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))  # (E, H)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw the weight, unless it already holds values."""
        init.normal_(self.weight, mean=0.0, std=self.init_std)
        mark_initialized(self)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_states: ``(S, H)``, any floating type.

        Returns:
            Logits ``(S, E)``, weights ``(S, k)``, both float32, and expert indices ``(S, k)``, best first.
        """
        with _full_precision(hidden_states.device.type):
            logits = F.linear(hidden_states.float(), self.weight.float())  # (S, E)
            _record(logits, self.weight.requires_grad or hidden_states.requires_grad)
            index = select_experts(logits.detach(), self.top_k)  # (S, k)
            weights = logits.softmax(dim=-1).gather(-1, index)  # (S, k)
            if self.norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, index

    def extra_repr(self) -> str:
        """Describe the router in `print(model)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, norm_topk_prob={self.norm_topk_prob}"


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Turn autocast off, on devices that have it (the meta device has not)."""
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield
