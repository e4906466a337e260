"""The router: which experts a token goes to, and with which weights.

Legend: S tokens of the whole batch, H width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from sparsevlm.moe.capacity import Capacity, kept
from sparsevlm.moe.groups import MOE


@dataclass(frozen=True)
class Routing:
    """What one router did in one forward pass.

    Attributes:
        logits: ``(S, E)`` float32, gradient attached.
        index: ``(S, k)`` int64 experts that took each token, best first; -1 where dropped or padding.
        chosen: ``(S, k)`` int64 experts that it asked for; -1 for padding only.
        group: Routers that it is one of, see `sparsevlm.moe.groups`.
    """

    logits: Tensor
    index: Tensor
    chosen: Tensor
    group: str = MOE


KEEP_FLOAT32 = "e_score_correction_bias"
"""The balance bias moves by steps that 16 bits would round away: it stays in float32 whatever the model's type."""

_COLLECTOR: ContextVar[tuple[list[Routing] | None, bool] | None] = ContextVar("sparsevlm_routing", default=None)


@contextmanager
def collect_routing(records: bool = True) -> Iterator[list[Routing]]:
    """Collect what every router does that runs inside the block.

    Nothing stays on a module: recomputation under gradient checkpointing would read, or write, the wrong call's.

    Args:
        records: Keep records. Without, the block only guards against reentrant checkpointing.

    Yields:
        List that each router appends a `Routing` to, in layer order.

    Raises:
        ValueError: A router ran without gradient although gradients are on: reentrant checkpointing, which would
            silently drop the gradient of the auxiliary losses.
    """
    collected: list[Routing] = []
    token = _COLLECTOR.set((collected if records else None, torch.is_grad_enabled()))
    try:
        yield collected
    finally:
        _COLLECTOR.reset(token)


def recomputing() -> bool:
    """Tell whether this forward pass is a recomputation: it then runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def record_routing(logits: Tensor, index: Tensor, chosen: Tensor | None = None) -> None:
    """Hand the work of a router to the collector that is active, if any; for routers that are not `TopKRouter`.

    Args:
        logits: ``(S, E)`` with gradient; kept in float32.
        index: ``(S, k)``, -1 where dropped or padding.
        chosen: ``(S, k)`` before dropping; default `index`.

    Raises:
        ValueError: See `collect_routing`.
    """
    _record(logits.requires_grad, lambda: Routing(logits.float(), index, index if chosen is None else chosen))


def _record(differentiable: bool, make: Callable[[], Routing]) -> None:
    """Append a record where one is asked for."""
    active = _COLLECTOR.get()
    if active is None or recomputing():  # the first forward has recorded it already
        return
    collected, grad_enabled = active
    if grad_enabled and differentiable and not torch.is_grad_enabled():
        raise ValueError(
            "router logits are computed without gradient: reentrant gradient checkpointing would silently drop the "
            "load-balancing gradient; use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if collected is not None:
        collected.append(make())


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
    """Linear router, in float32 whatever surrounds it.

    Three scorings. ``softmax``: probabilities over all experts, of which the best k are the weights. ``topk_softmax``:
    a softmax over the logits of the best k. ``sigmoid``: each expert's own; a balance bias is added for the choice
    alone, never to the weight.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: k.
        norm_topk_prob: Divide the weights of the experts that took the token by their sum. Only then does a layer of
            identical experts equal the dense layer; with k = 1 the weight is then always 1 and only the balancing loss
            trains the router.
        init_std: Standard deviation of fresh weights.
        scoring_func: See above.
        jitter: In training, the router's input (not the experts') is multiplied by factors from
            ``U[1 - jitter, 1 + jitter]``. Checkpointing restores the random state, so recomputation draws the same.
        balance_bias: Keep the buffer `e_score_correction_bias` ``(E,)``, which `train.balance` updates.
        capacity: When experts turn tokens away; default never.
        group: Routers that it is one of, see `sparsevlm.moe.groups`.

    Source: Mixtral's router (transformers), MoE-LLaVA section 3.2; jitter: Switch Transformer (arXiv:2101.03961)
    appendix F; sigmoid and bias: DeepSeek-V3 (arXiv:2412.19437) section 2.1.2. *Deviations*: ties go to the lower
    index; no groups of experts and no scaling factor.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        norm_topk_prob: bool = True,
        init_std: float = 0.02,
        scoring_func: str = "softmax",
        jitter: float = 0.0,
        balance_bias: bool = False,
        capacity: Capacity | None = None,
        group: str = MOE,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.init_std = init_std
        self.scoring_func = scoring_func
        self.jitter = jitter
        self.capacity = capacity or Capacity()
        self.group = group
        self.tally: Tensor | None = None
        """Where to count the tokens that ask for each expert ``(E,)`` int64; set by who wants them, in training."""
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))  # (E, H)
        bias = torch.zeros(num_experts, dtype=torch.float32) if balance_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw the weight and zero the bias, unless they already hold values."""
        init.normal_(self.weight, mean=0.0, std=self.init_std)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)
        mark_initialized(self)

    def _apply(self, fn: Any, recurse: bool = True) -> TopKRouter:
        """Keep the bias in float32: a bfloat16 one would not feel steps of a thousandth."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None:
            if before.is_meta and not after.is_meta:  # `to_empty`: there is nothing but the start to put there
                self.e_score_correction_bias = torch.zeros_like(after, dtype=torch.float32)
            elif after.dtype != torch.float32:
                self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_states: ``(S, H)``, any floating type.
            token_mask: ``(S,)`` bool, False for padding; None: all are real.

        Returns:
            Logits ``(S, E)``, weights ``(S, k)``, both float32, and expert indices ``(S, k)``, best first. Dropped and
            padding assignments keep an index and have weight 0.
        """
        with _full_precision(hidden_states.device.type):
            x = hidden_states.float()  # (S, H)
            if self.jitter and self.training:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = F.linear(x, self.weight.float())  # (S, E)
            index = select_experts(self._choice_scores(logits.detach()), self.top_k)  # (S, k)
            keep = self._kept(index, logits.detach(), token_mask)  # (S, k) or None
            weights = self._weights(logits, index, keep)  # (S, k)
        self._note(logits, index, keep, token_mask, self.weight.requires_grad or hidden_states.requires_grad)
        return logits, weights, index

    def _choice_scores(self, logits: Tensor) -> Tensor:
        """Return what the choice is made by, ``(S, E)``; softmax and sigmoid keep the order of the logits."""
        if self.e_score_correction_bias is None:
            return logits
        return logits.sigmoid() + self.e_score_correction_bias

    def _weights(self, logits: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        """Return the weights of the chosen experts ``(S, k)``, 0 where not kept."""
        chosen = logits.gather(-1, index)  # (S, k)
        if self.scoring_func == "sigmoid":
            weights = chosen.sigmoid() if keep is None else chosen.sigmoid() * keep
            return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) if self.norm_topk_prob else weights
        if self.norm_topk_prob:  # probabilities over their sum are a softmax over the survivors: no tiny divisors
            if keep is None:
                return chosen.softmax(dim=-1)
            return chosen.masked_fill(~keep, torch.finfo(chosen.dtype).min).softmax(dim=-1) * keep
        if self.scoring_func == "topk_softmax":
            weights = chosen.softmax(dim=-1)
        else:
            weights = logits.softmax(dim=-1).gather(-1, index)
        return weights if keep is None else weights * keep

    def _kept(self, index: Tensor, logits: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Return the assignments that count, ``(S, k)`` bool; None where all do."""
        real = index.shape[0]
        everyone = None if token_mask is None else token_mask[:, None].expand_as(index)
        if (self.capacity.factor if self.training else self.capacity.eval_factor) is None:
            return everyone
        if token_mask is not None:
            real = int(token_mask.sum())
        limit = self.capacity.limit(self.training, real, self.num_experts, self.top_k)
        if limit is None or limit >= real:
            return everyone
        # Not the weights: k numbers that sum to 1 say nothing across tokens.
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(dim=-1)  # (S, E)
        return kept(index, scores.gather(-1, index), self.num_experts, limit, self.capacity.policy, token_mask)

    def _note(
        self, logits: Tensor, index: Tensor, keep: Tensor | None, token_mask: Tensor | None, differentiable: bool
    ) -> None:
        """Count and record what was chosen, for those who asked."""
        if self.tally is not None and self.training and torch.is_grad_enabled() and not recomputing():
            asked = index if token_mask is None else index[token_mask]
            self.tally += torch.bincount(asked.reshape(-1), minlength=self.num_experts).to(self.tally)

        def record() -> Routing:
            chosen = index if token_mask is None else index.masked_fill(~token_mask[:, None], -1)
            return Routing(logits, index if keep is None else index.masked_fill(~keep, -1), chosen, self.group)

        _record(differentiable, record)

    def extra_repr(self) -> str:
        """Describe the router in `print(model)`."""
        text = f"num_experts={self.num_experts}, top_k={self.top_k}, norm_topk_prob={self.norm_topk_prob}"
        text += f", scoring_func={self.scoring_func!r}"
        text += f", jitter={self.jitter}" if self.jitter else ""
        return text + (f", {self.capacity}" if self.capacity.factor or self.capacity.eval_factor else "")


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Turn autocast off, on devices that have it (the meta device has not)."""
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield
