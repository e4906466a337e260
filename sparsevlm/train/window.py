"""The numbers of a log line: what happened in the steps since the last one.

Legend: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.data.sample import IGNORE_INDEX
from sparsevlm.moe.groups import MOE, Settings, by_group
from sparsevlm.moe.metrics import (
    RoutingSums,
    count_modalities,
    expert_similarity,
    mean_cosine,
    measure_routing,
    summarise_routing,
    token_modality,
)

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


def routing_of_batch(
    config: Any, groups: Mapping[str, Settings], inputs: Mapping[str, Any], outputs: Any
) -> dict[str, RoutingSums]:
    """Return what each group of routers did with a micro-batch, given what the model took and gave."""
    modality = token_modality(
        inputs["input_ids"], config.image_token_id, config.video_token_id, inputs.get("attention_mask")
    )
    ran = by_group(outputs.router_groups, outputs.router_logits, outputs.router_indices)
    return {
        name: measure_routing(logits, indices, modality, groups[name].get("scoring_func", "softmax"))
        for name, (logits, indices) in ran
    }


def routing_record(sums: RoutingSums, layers: Sequence[int], similarity: Sequence[float]) -> dict[str, Any]:
    """Return the entry of a group of routers in a line of metrics.jsonl.

    Args:
        sums: Of all ranks.
        layers: Decoder layers that they are in.
        similarity: Mean cosine between the experts of each.
    """
    summaries = summarise_routing(sums)
    # One number for the progress line; a mean would hide a collapsed layer behind healthy ones.
    record: dict[str, Any] = {"balance": min(numbers.pop("balance") for numbers in summaries)}
    record["tokens"] = count_modalities(sums)  # a step may hold one picture: few tokens are never even
    for layer, numbers, cosine in zip(layers, summaries, similarity, strict=True):
        record[f"layer_{layer}"] = {**numbers, "similarity": cosine}
    return record


def routing_scalars(record: Mapping[str, Any], group: str = MOE) -> dict[str, float]:
    """Return what TensorBoard and the like get of a `routing_record`: a handful of curves, whatever the model's size.

    `balance` and `max_violation` are the worst layer's, `dead_experts` the sum, the others means over layers.
    """
    layers = [numbers for name, numbers in record.items() if name.startswith("layer_")]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(layers)

    return {
        f"{group}/balance": record["balance"],
        f"{group}/max_violation": max(numbers["max_violation"] for numbers in layers),
        f"{group}/dead_experts": sum(numbers["dead_experts"] for numbers in layers),
        f"{group}/entropy": mean(numbers["entropy"]["all"] for numbers in layers),
        f"{group}/dropped_share": mean(numbers["dropped_share"] for numbers in layers),
        f"{group}/similarity": mean(numbers["similarity"] for numbers in layers),
        f"{group}/logit_rms": mean(numbers["logit_rms"] for numbers in layers),
    }


class Window:
    """Sums since the last log.

    Attributes:
        counts: ``(5,)`` over all ranks.
        losses: Sums of the routers' losses on this rank, by name.
        batches: Micro-batches that they were added from.
        routing: Sums of the steps that were measured, on this rank, by group of routers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)
        self.losses: dict[str, Tensor] = {}
        self.batches = 0
        self.routing: dict[str, RoutingSums] = {}
        self._since = time.perf_counter()

    def add_losses(self, **losses: Tensor | None) -> None:
        """Add the routers' losses of a micro-batch, those that there are."""
        for name, loss in losses.items():
            if loss is not None:
                self.losses[name] = self.losses.get(name, 0) + loss.detach()
        self.batches += 1

    def add_routing(self, measured: Mapping[str, RoutingSums]) -> None:
        """Add the routing of a micro-batch."""
        for group, sums in measured.items():
            self.routing[group] = self.routing[group] + sums if group in self.routing else sums

    def routing_records(
        self, model: nn.Module, groups: Mapping[str, Settings], gather: Callable[[Tensor], Any]
    ) -> dict[str, dict[str, Any]]:
        """Return the `routing_record` of each group that was measured; of all ranks, which all call it."""
        records = {}
        for group, sums in self.routing.items():
            total = sums.unpack(gather(sums.pack()[None]).sum(0))
            similarity = [mean_cosine(cosines) for cosines in expert_similarity(model, group)]
            records[group] = routing_record(total, groups[group]["layers"], similarity)
        return records

    def leave_out(self, seconds: float) -> None:
        """Leave time (spent on a checkpoint) out of the throughput."""
        self._since += seconds

    @property
    def seconds(self) -> float:
        """Seconds of training since the last log."""
        return max(time.perf_counter() - self._since, 1e-9)

    def metrics(self, gather: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return the numbers, those of the routing apart.

        Args:
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
        for name, total in self.losses.items():
            metrics[name] = float(gather((total / self.batches).reshape(1)).mean())
        return metrics

    def state(self) -> dict[str, Any]:
        """Return the sums as JSON types, for a checkpoint within the window.

        Routing is not among them: it is measured in the step that logs, and checkpoints follow the log.
        """
        assert not self.routing
        return {
            "counts": self.counts.tolist(),
            "losses": {name: float(total) for name, total in self.losses.items()},
            "batches": self.batches,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.counts = torch.tensor(state["counts"], device=self.device)
        self.losses = {name: torch.tensor(total, device=self.device) for name, total in state["losses"].items()}
        self.batches = state["batches"]
        self._since = time.perf_counter() - state["seconds"]
