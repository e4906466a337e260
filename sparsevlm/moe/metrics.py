"""How tokens are spread over experts, layer by layer.

Legend: S tokens, E experts, k experts a token, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.moe.router import select_experts


@torch.no_grad()
def routing_metrics(
    router_logits: Sequence[Tensor],
    top_k: int,
    token_mask: Tensor | None = None,
    groups: Mapping[str, Tensor] | None = None,
) -> dict[str, list]:
    """Measure the routing of a batch.

    Args:
        router_logits: One ``(S, E)`` tensor a MoE layer.
        top_k: k.
        token_mask: S numbers in any shape, 0 for tokens that must not count (padding).
        groups: Names of token groups (modalities, …) and their masks; each adds its own ``load/NAME``.

    Returns:
        Lists of L entries: ``load`` (E shares of the S * k assignments, summing to 1), ``max_violation`` (the largest
        load over the fair one, minus 1: 0 is balance, E / k - 1 collapse), ``dead_experts`` (experts that got no
        token), ``entropy`` (mean entropy of a token's routing distribution over log E: 1 is undecided).
    """
    result: dict[str, list] = {"load": [], "max_violation": [], "dead_experts": [], "entropy": []}
    result |= {f"load/{name}": [] for name in groups or {}}
    for logits in router_logits:
        tokens, num_experts = logits.shape
        sent = F.one_hot(select_experts(logits, top_k), num_experts).sum(dim=1).double()  # (S, E)
        keep = torch.ones(tokens).to(sent) if token_mask is None else token_mask.reshape(-1).to(sent)  # (S,)
        load = _share(keep @ sent)
        log_p = logits.double().log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1) / math.log(num_experts)  # (S,)
        result["load"].append(load.tolist())
        result["max_violation"].append(float(load.max() * num_experts - 1))
        result["dead_experts"].append(int((load == 0).sum()))
        result["entropy"].append(float((keep @ entropy) / keep.sum().clamp(min=1)))
        for name, mask in (groups or {}).items():
            result[f"load/{name}"].append(_share((keep * mask.reshape(-1).to(sent)) @ sent).tolist())
    return result


def _share(counts: Tensor) -> Tensor:
    """Divide counts by their sum; zeros stay zeros."""
    return counts / counts.sum().clamp(min=1)
