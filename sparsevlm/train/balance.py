"""Balance without a loss: a bias on each expert's score, moved after every optimizer step.

Legend: E experts, L MoE layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsevlm.moe.groups import MOE, router_groups
from sparsevlm.moe.router import TopKRouter


def balance_callbacks(model: Any) -> list[BalanceBias]:
    """Return what keeps the experts of a model balanced: one callback for each group that asks for a balance bias."""
    rates = {group: settings.get("bias_update_rate", 0.0) for group, settings in router_groups(model).items()}
    return [BalanceBias(model, rate, group) for group, rate in rates.items() if rate]


class BalanceBias(TrainerCallback):
    """Raises the bias of experts that fewer tokens than average ask for, and lowers that of the others.

    Counted are the tokens of a whole optimizer step: all micro-batches of all ranks, without padding, before any is
    dropped, and once where a layer is recomputed. The biases are saved with the weights and the counts end with the
    step, so a resumed run goes on as it would have, and every rank computes the same bias. A frozen router keeps its.

    Args:
        model: Model whose routers have a balance bias.
        rate: Size of a step.
        group: Routers that it is for, see `sparsevlm.moe.groups`.

    Source: Auxiliary-loss-free load balancing (arXiv:2408.15664) algorithm 1; DeepSeek-V3 (arXiv:2412.19437) section
    2.1.2.
    """

    def __init__(self, model: Any, rate: float, group: str = MOE) -> None:
        self.model = model
        self.rate = rate
        self.group = group
        self.routers: list[TopKRouter] = []
        self.counts = torch.zeros(0, 0, dtype=torch.int64)  # (L, E)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting.

        Raises:
            ValueError: The routers are not ours any more.
        """
        found = [
            module for module in self.model.modules() if isinstance(module, TopKRouter) and module.group == self.group
        ]
        if not found:
            raise ValueError(
                "the model has a balance bias (bias_update_rate), but its routers were replaced: DeepSpeed's expert "
                "parallelism knows no such bias; set sharding.expert_parallel: 1, or balance by aux_loss_coef"
            )
        self.routers = [
            router for router in found if router.e_score_correction_bias is not None and router.weight.requires_grad
        ]
        if not self.routers:
            return
        bias = self.routers[0].e_score_correction_bias
        assert bias is not None
        self.counts = torch.zeros(len(self.routers), bias.numel(), dtype=torch.int64, device=bias.device)
        for router, row in zip(self.routers, self.counts, strict=True):
            router.tally = row

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases."""
        if not self.routers:
            return
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.counts)
        for router, count in zip(self.routers, self.counts, strict=True):
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias += self.rate * direction(count)
        self.counts.zero_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        for router in self.routers:
            router.tally = None
        self.routers = []


def direction(counts: Tensor) -> Tensor:
    """Return 1 for experts below the mean load ``(E,)``, -1 for those above, 0 at it; in whole numbers, so exact."""
    return (counts.sum() - counts * counts.numel()).sign().float()
