"""The load-balancing loss.

Legend: S tokens, E experts, k experts a token, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.moe.router import select_experts


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    token_mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "pooled"] = "mean",
    count: Literal["all", "first"] = "all",
) -> Tensor:
    """Return how unevenly the routers spread tokens over experts: ``E * sum_e f_e * p_e``.

    p_e is the mean probability of expert e. f_e is the number of tokens sent to e over the number of tokens, so that
    with ``count="all"`` perfect balance gives k, and collapse onto k experts gives up to E; only p carries gradient.

    Args:
        router_logits: One ``(S, E)`` tensor a MoE layer.
        top_k: k.
        token_mask: S numbers in any shape, 0 for tokens that must not count (padding).
        reduction: Over layers. ``mean`` of the layers' losses: a coefficient means the same for any number of MoE
            layers, and every layer is balanced by itself. ``sum``: MoE-LLaVA. ``pooled``: f and p over the tokens of
            all layers together, as transformers' `load_balancing_loss_func` does; one layer's excess then hides
            another's lack. With one layer all three agree.
        count: f counts ``all`` k choices (transformers, and what a token costs), or the ``first`` only (GShard,
            DeepSpeed's gate and so MoE-LLaVA; balance then gives 1).

    Returns:
        Scalar, float32.

    Raises:
        ValueError: No layer, or a mask that does not fit the tokens.

    Source: Switch Transformer (arXiv:2101.03961) equations 4 to 6; transformers' Mixtral.
    """
    if not router_logits:
        raise ValueError("load_balancing_loss needs the router logits of at least one MoE layer, got none")
    num_experts = router_logits[0].shape[-1]
    device = router_logits[0].device
    counts, probabilities, tokens = [], [], []
    for logits in router_logits:
        mask = _flat_mask(token_mask, logits)  # (S,)
        chosen = select_experts(logits.detach(), top_k if count == "all" else 1)  # (S, k)
        sent = F.one_hot(chosen, num_experts).sum(dim=1).float()  # (S, E)
        counts.append((mask @ sent).to(device))  # (E,)
        probabilities.append((mask @ logits.float().softmax(dim=-1)).to(device))  # (E,)
        tokens.append(mask.sum().clamp(min=1).to(device))
    f, p, n = torch.stack(counts), torch.stack(probabilities), torch.stack(tokens)  # (L, E), (L, E), (L,)
    if reduction == "pooled":
        f, p, n = f.sum(0, keepdim=True), p.sum(0, keepdim=True), n.sum(0, keepdim=True)  # (1, E), (1, E), (1,)
    layer_losses = num_experts * (f * p).sum(dim=-1) / n.square()  # (L,) or (1,)
    return layer_losses.sum() if reduction == "sum" else layer_losses.mean()


def _flat_mask(token_mask: Tensor | None, logits: Tensor) -> Tensor:
    """Return the mask as S floats on the device of the logits; ones where there is none."""
    if token_mask is None:
        return logits.new_ones(logits.shape[0], dtype=torch.float32)
    if token_mask.numel() != logits.shape[0]:
        raise ValueError(
            f"token_mask {tuple(token_mask.shape)} has {token_mask.numel()} entries, but the routers saw "
            f"{logits.shape[0]} tokens"
        )
    return token_mask.reshape(-1).to(logits.device, torch.float32)
