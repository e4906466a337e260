"""What a stage trains, with which optimizer, over how many processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Positive, Strict, number

Part = Literal[
    "vision", "connector", "connector.qformer", "connector.projector", "fusion", "language", "embeddings", "ffn", "moe",
    "moe.router", "moe.experts", "adapter",
]  # fmt: skip
"""What a stage can train. `language` is the whole language model; parts of it that can be named alone are `embeddings`
(input and output), `ffn` (the dense FFNs) and `moe`, which is `moe.router` and `moe.experts`. `connector` is
`connector.qformer` (Q-Formers with their queries) and `connector.projector` (the rest). `adapter` is what the stage's
`adapter` adds, wherever that stands."""

MOE_PARTS: tuple[str, ...] = ("moe", "moe.router", "moe.experts")
"""Parts that only a sparse model has."""

_Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Strict):
    """Optimizer and schedule of a stage."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    part_lr: dict[Part, Positive] = {}
    """Learning rates of single parts."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warmup, to zero at the last step (`constant`: none)."""
    min_lr: float = Field(default=0.0, ge=0)
    """Rate that `cosine` decays to instead of zero; those of single parts end in the same proportion to their peaks."""
    warmup: float = Field(default=0.03, ge=0)
    """Share of the steps below 1, number of steps from 1 on."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; never on biases, norms and embeddings."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient norm; 0 turns clipping off."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        least, most = number(raw.get("min_lr", 0)), number(raw.get("lr", 1e-4))
        if least and raw.get("schedule", "cosine") != "cosine":
            yield ("min_lr",), f"only 'schedule: cosine' decays to a rate, the schedule is {raw['schedule']!r}"
        if least is not None and most is not None and least > most:
            yield ("min_lr",), f"{least:g} is more than the peak learning rate {most:g}"


class Sharding(Strict):
    """How a stage is spread over processes (DeepSpeed ZeRO)."""

    zero: Literal[0, 1, 2, 3] = 0
    """0: plain data parallelism without DeepSpeed. 1: optimizer states, 2: also gradients, 3: also parameters are
    sharded."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer states (`optimizer`) or also parameters (`all`, ZeRO-3 only) in host memory."""
    expert_parallel: int = Field(default=1, ge=1)
    """Ranks over which the experts of an MoE layer are spread (DeepSpeed AutoEP), in stages whose model is sparse.
    Divides the number of processes and of experts."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        zero = raw.get("zero", 0)
        if raw.get("offload") == "optimizer" and zero == 0:
            yield ("offload",), "'offload: optimizer' needs 'zero: 1', 2 or 3"
        if raw.get("offload") == "all" and zero != 3:
            yield ("offload",), f"'offload: all' needs 'zero: 3', got {zero}"
        if number(raw.get("expert_parallel", 1)) not in (1, None) and zero == 0:
            yield ("expert_parallel",), "'expert_parallel' needs 'zero: 1', 2 or 3"
