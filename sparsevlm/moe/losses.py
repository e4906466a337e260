"""Losses on the routers: load balancing and the z-loss.

Legend: S tokens, E experts, k experts a token, L MoE layers, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from sparsevlm.moe.groups import Settings, by_group
from sparsevlm.moe.router import select_experts


def wants_losses(groups: Mapping[str, Settings]) -> bool:
    """Tell whether any group of routers asks for a loss."""
    return any(
        settings.get("router_aux_loss_coef", 0.0) or settings.get("router_z_loss_coef", 0.0)
        for settings in groups.values()
    )


def add_routing_losses(
    loss: Tensor,
    groups: Mapping[str, Settings],
    names: Sequence[str],
    router_logits: Sequence[Tensor],
    router_choices: Sequence[Tensor],
    token_mask: Tensor | None,
    *,
    training: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Add to a model's loss what its routers ask for, group by group with the group's own coefficients.

    Args:
        loss: Scalar.
        groups: See `sparsevlm.moe.groups`.
        names: Group of each router that ran.
        router_logits: Beside them, ``(S, E)``; E may differ between groups.
        router_choices: Beside them, ``(S, k)`` experts asked for.
        token_mask: S numbers in any shape, 0 for padding.
        training: See `auxiliary_losses`.
        scale: Factor besides the coefficients.

    Returns:
        The loss, and the load-balancing and the z-loss that are in it, not weighted: summed over groups where there are
        several, None where no group that ran asks for one.

    Raises:
        ValueError: A router of an unknown group ran.
    """
    sums: list[Tensor | None] = [None, None]
    for name, (logits, choices) in by_group(names, router_logits, router_choices):
        if name not in groups:
            raise ValueError(
                f"routers of {name!r} ran, but the model knows nothing of them (it has {', '.join(groups) or 'none'}); "
                "put the adapter on the whole model instead of on a part of it"
            )
        settings = groups[name]
        values = auxiliary_losses(settings, logits, choices, token_mask, training)
        for i, (option, value) in enumerate(zip(("router_aux_loss_coef", "router_z_loss_coef"), values, strict=True)):
            if value is not None:
                loss = loss + settings[option] * scale * value.to(loss.device)
                before = sums[i]
                sums[i] = value if before is None else before + value.to(before.device)
    return loss, sums[0], sums[1]


def auxiliary_losses(
    moe: Mapping[str, Any],
    router_logits: Sequence[Tensor],
    router_choices: Sequence[Tensor],
    token_mask: Tensor | None,
    training: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the load-balancing and the z-loss that a group of routers asks for, not weighted.

    Args:
        moe: The group's settings: for MoE layers the `moe` field of the model's config.
        router_logits: One ``(S, E)`` tensor a MoE layer.
        router_choices: Beside them, ``(S, k)`` experts asked for.
        token_mask: S numbers in any shape, 0 for padding.
        training: All ranks are here. An evaluation may run on one alone, so its losses are never global.

    Returns:
        Scalars; None where the coefficient is 0.
    """
    aux_loss, z_loss = None, None
    if moe.get("router_aux_loss_coef", 0.0):
        aux_loss = load_balancing_loss(
            router_logits,
            moe["num_experts_per_tok"],
            token_mask,
            choices=router_choices,
            scoring=moe.get("scoring_func", "softmax"),
            reduction=moe.get("aux_loss_reduction", "mean"),
            count=moe.get("aux_loss_count", "all"),
            scope=moe.get("aux_loss_scope", "device") if training else "device",
        )
    if moe.get("router_z_loss_coef", 0.0):
        z_loss = router_z_loss(router_logits, token_mask)
    return aux_loss, z_loss


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    token_mask: Tensor | None = None,
    *,
    choices: Sequence[Tensor] | None = None,
    scoring: str = "softmax",
    reduction: Literal["mean", "sum", "pooled"] = "mean",
    count: Literal["all", "first"] = "all",
    scope: Literal["device", "global"] = "device",
) -> Tensor:
    """Return how unevenly the routers spread tokens over experts: ``E * sum_e f_e * p_e``.

    p_e is the mean probability of expert e. f_e is the number of tokens that ask for e over the number of tokens
    (before any is dropped), so that with ``count="all"`` perfect balance gives k, and collapse onto k experts gives up
    to E; only p carries gradient.

    With ``scope="global"`` f and p are those of the tokens of all ranks. Their mean over ranks, value and gradient
    alike, is what one process would get from all the tokens: rank r returns ``E * sum_e f_e * s_re * W / N``, where
    s_re is the sum of its probabilities and N the number of all tokens. So the gradient is right wherever gradients are
    averaged over ranks, as for a loss of each device's own.

    Args:
        router_logits: One ``(S, E)`` tensor a MoE layer.
        top_k: k.
        token_mask: S numbers in any shape, 0 for tokens that must not count (padding).
        choices: One ``(S, k)`` tensor a layer, the experts that the router asked for, best first; masked tokens may
            hold anything. Default: the largest logits. A balance bias or ties make the difference.
        scoring: ``sigmoid``: a token's probabilities are its sigmoid scores over their sum. Else: softmax.
        reduction: Over layers. ``mean`` of the layers' losses: a coefficient means the same for any number of MoE
            layers, and every layer is balanced by itself. ``sum``: MoE-LLaVA. ``pooled``: f and p over the tokens of
            all layers together, as transformers' `load_balancing_loss_func` does; one layer's excess then hides
            another's lack. With one layer all three agree.
        count: f counts ``all`` k choices (transformers, and what a token costs), or the ``first`` only (GShard,
            DeepSpeed's gate and so MoE-LLaVA; balance then gives 1).
        scope: Tokens that f and p are taken over. ``global`` is a collective operation where there are several ranks.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: No layer, a mask that does not fit the tokens, or an unknown word.

    Source: Switch Transformer (arXiv:2101.03961) equations 4 to 6; transformers' Mixtral; normalised sigmoid scores:
    DeepSeek-V3 (arXiv:2412.19437) equations 17 to 20; global: Demons in the Detail (arXiv:2501.11873). *Deviation* from
    the last: p is weighted by the ranks' numbers of tokens too.
    """
    if not router_logits:
        raise ValueError("load_balancing_loss needs the router logits of at least one MoE layer, got none")
    for name, word, known in (
        ("scoring", scoring, ("softmax", "topk_softmax", "sigmoid")),
        ("reduction", reduction, ("mean", "sum", "pooled")),
        ("count", count, ("all", "first")),
        ("scope", scope, ("device", "global")),
    ):
        if word not in known:
            raise ValueError(f"{name} of the load-balancing loss is {word!r}; it must be one of {', '.join(known)}")
    num_experts = router_logits[0].shape[-1]
    device = router_logits[0].device
    counts, probabilities, tokens = [], [], []
    for layer, logits in enumerate(router_logits):
        mask = _flat_mask(token_mask, logits)  # (S,)
        chosen = select_experts(logits.detach(), top_k) if choices is None else choices[layer]  # (S, k)
        chosen = chosen[:, : top_k if count == "all" else 1].clamp(min=0)  # -1: masked anyway
        sent = F.one_hot(chosen, num_experts).sum(dim=1).float()  # (S, E)
        counts.append((mask @ sent).to(device))  # (E,)
        probabilities.append((mask @ _probabilities(logits, scoring)).to(device))  # (E,)
        tokens.append(mask.sum().to(device))
    f, p, n = torch.stack(counts), torch.stack(probabilities), torch.stack(tokens)  # (L, E), (L, E), (L,)
    if reduction == "pooled":
        f, p, n = f.sum(0, keepdim=True), p.sum(0, keepdim=True), n.sum(0, keepdim=True)  # (1, E), (1, E), (1,)
    ranks = 1
    if scope == "global" and distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        total = torch.cat([f, n[:, None]], dim=1)  # (L, E + 1); no gradient in it
        distributed.all_reduce(total)
        f, n = total[:, :-1], total[:, -1]
    layer_losses = num_experts * ranks * (f * p).sum(dim=-1) / n.clamp(min=1).square()  # (L,) or (1,)
    return layer_losses.sum() if reduction == "sum" else layer_losses.mean()


def router_z_loss(router_logits: Sequence[Tensor], token_mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens and layers of ``logsumexp(logits) ** 2``, which grows with the logits' size.

    Args:
        router_logits: One ``(S, E)`` tensor a MoE layer.
        token_mask: S numbers in any shape, 0 for tokens that must not count (padding).

    Returns:
        Scalar, float32.

    Raises:
        ValueError: No layer, or a mask that does not fit the tokens.

    Source: ST-MoE (arXiv:2202.08906) equation 5. *Deviation*: a mean over layers, so that the coefficient means the
    same for any number of them.
    """
    if not router_logits:
        raise ValueError("router_z_loss needs the router logits of at least one MoE layer, got none")
    losses = []
    for logits in router_logits:
        mask = _flat_mask(token_mask, logits)  # (S,)
        squares = logits.float().logsumexp(dim=-1).square()  # (S,)
        losses.append(((mask @ squares) / mask.sum().clamp(min=1)).to(router_logits[0].device))
    return torch.stack(losses).mean()


def _probabilities(logits: Tensor, scoring: str) -> Tensor:
    """Return each token's distribution over experts, ``(S, E)``."""
    if scoring != "sigmoid":
        return logits.float().softmax(dim=-1)
    scores = logits.float().sigmoid()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


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
