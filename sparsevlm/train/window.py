"""The numbers of a log line: what happened in the steps since the last one.

Legend: S tokens of a micro-batch, E experts, k experts a token, L MoE layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsevlm.data.sample import IGNORE_INDEX
from sparsevlm.moe.router import select_experts

TARGETS, TOKENS, SLOTS, VISUAL, SAMPLES = range(5)
"""Columns of counts: target tokens, real tokens, tokens with padding, visual tokens, samples."""


def count_batch(batch: dict[str, Any], visual_ids: Tensor, samples: int) -> Tensor:
    """Count a micro-batch, ``(5,)`` int64; see `TARGETS` and following."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    slots = ids.numel()
    return torch.tensor(
        [
            int((batch["labels"][..., 1:] != IGNORE_INDEX).sum()),
            slots if mask is None else int(mask.sum()),
            slots,
            int(torch.isin(ids, visual_ids).sum()),
            samples,
        ]
    )


def expert_counts(router_logits: Sequence[Tensor], top_k: int, mask: Tensor | None) -> Tensor:
    """Return how many tokens each expert of each layer got, ``(L, E)`` int64.

    Args:
        router_logits: ``(S, E)`` a layer.
        top_k: k.
        mask: S numbers in any shape, 0 for padding.
    """
    rows = []
    for logits in router_logits:
        chosen = select_experts(logits.detach(), top_k)  # (S, k)
        if mask is not None:
            chosen = chosen[mask.reshape(-1).bool()]
        rows.append(torch.bincount(chosen.reshape(-1), minlength=logits.shape[-1]))
    return torch.stack(rows)


class Window:
    """Sums since the last log.

    Attributes:
        counts: ``(5,)`` over all ranks.
        aux_loss: Sum of the load-balancing losses on this rank.
        aux_batches: Number of them.
        experts: ``(L, E)`` tokens of each expert on this rank, in the steps that were measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)
        self.aux_loss = torch.zeros((), device=device)
        self.aux_batches = 0
        self.experts: Tensor | None = None
        self._since = time.perf_counter()

    def add_aux(self, aux_loss: Tensor) -> None:
        """Add the load-balancing loss of a micro-batch."""
        self.aux_loss = self.aux_loss + aux_loss.detach()
        self.aux_batches += 1

    def add_experts(self, counts: Tensor) -> None:
        """Add the `expert_counts` of a micro-batch."""
        self.experts = counts if self.experts is None else self.experts + counts

    def leave_out(self, seconds: float) -> None:
        """Leave time (spent on a checkpoint) out of the throughput."""
        self._since += seconds

    @property
    def seconds(self) -> float:
        """Seconds of training since the last log."""
        return max(time.perf_counter() - self._since, 1e-9)

    def metrics(self, moe_layers: Sequence[int], gather: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return the numbers; names with ``/`` are nested in metrics.jsonl.

        Args:
            moe_layers: Decoder layers that are MoE.
            gather: Concatenates a tensor of all ranks along its first dimension.
        """
        counts, seconds = self.counts.tolist(), self.seconds
        metrics: dict[str, float] = {
            "tokens_per_second": counts[TOKENS] / seconds,
            "tokens": counts[TOKENS],
            "target_tokens": counts[TARGETS],
            "visual_tokens": counts[VISUAL],
            "samples": counts[SAMPLES],
            "padding_share": 1 - counts[TOKENS] / max(counts[SLOTS], 1),
        }
        if self.aux_batches:
            metrics["aux_loss"] = float(gather((self.aux_loss / self.aux_batches).reshape(1)).mean())
        if self.experts is not None:
            total = gather(self.experts[None]).sum(0)  # (L, E)
            load = total / total.sum(-1, keepdim=True).clamp(min=1)
            for layer, row in zip(moe_layers, load.tolist(), strict=True):
                metrics |= {f"expert_load/layer_{layer}/{expert}": share for expert, share in enumerate(row)}
        return metrics

    def state(self) -> dict[str, Any]:
        """Return the sums as JSON types, for a checkpoint within the window."""
        return {
            "counts": self.counts.tolist(),
            "aux_loss": float(self.aux_loss),
            "aux_batches": self.aux_batches,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.counts = torch.tensor(state["counts"], device=self.device)
        self.aux_loss = torch.tensor(state["aux_loss"], device=self.device)
        self.aux_batches = state["aux_batches"]
        self._since = time.perf_counter() - state["seconds"]
