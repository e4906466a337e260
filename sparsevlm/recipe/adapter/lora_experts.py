"""`adapter: {type: lora_experts}`: routed LoRA experts on frozen FFNs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from sparsevlm.recipe.moe import LayerChoice, Router, routed_layer_faults
from sparsevlm.recipe.section import CrossFault, Strict, view


class LoraExperts(Strict):
    """A mixture of LoRA experts: a router sends each token to some of several low-rank additions to a frozen FFN.

    LLaVA-MoLE (Chen et al., arXiv:2401.16160), with the router, losses and metrics of upcycled MoE layers. Which
    experts a token passes depends on the token, so it cannot be merged: a stage with it is the last one.
    """

    mergeable: ClassVar[bool] = False
    zero: ClassVar[int] = 3

    type: Literal["lora_experts"]
    """Kind of adapter."""
    layers: LayerChoice = "all"
    """Decoder layers whose FFN gets experts: `all`, `alternate` (0, 2, 4, …), a half, or a list of indices. A word
    leaves out layers that are MoE already; an index of one is refused."""
    experts: int = Field(default=4, ge=2, le=4096)
    """Experts an FFN. Each is a pair of low-rank matrices at every linear layer of it."""
    top_k: int = Field(default=2, ge=1)
    """Experts a token is sent to; LLaVA-MoLE: 1. With 1 and `router.norm_topk_prob` a token's weight is always 1, and
    only the balancing loss trains the router."""
    r: int = Field(default=16, ge=1)
    """Rank of an expert."""
    alpha: int = Field(default=32, ge=1)
    """The additions are multiplied by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the additions, while training."""
    rslora: bool = False
    """Multiply by `alpha / sqrt(r)` instead (rsLoRA, arXiv:2312.03732)."""
    router: Router = Router()
    """How tokens choose experts, as in `upcycle`. Whatever is chosen, the start computes what the parent does; `kmeans`
    and `modality` are not offered."""
    aux_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss."""
    aux_loss_reduction: Literal["mean", "sum"] = "mean"
    """Over layers, see `upcycle`."""
    aux_loss_count: Literal["all", "first"] = "all"
    """Choices whose balance is asked for, see `upcycle`."""
    aux_loss_scope: Literal["device", "global"] = "device"
    """Tokens over which balance is asked for, see `upcycle`."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from routed_layer_faults(raw)
        if view(raw.get("router")).get("init") == "kmeans":
            yield ("router", "init"), "'kmeans' is for upcycled experts; LoRA experts start with 'normal' or 'zero'"
        if view(raw.get("router")).get("scoring") == "modality":
            yield (
                ("router", "scoring"),
                "'modality' is for upcycled experts; see `partial_lora` for visual tokens alone",
            )
