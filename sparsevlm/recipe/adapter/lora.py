"""`adapter: {type: lora}`: low-rank additions to frozen matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Strict, names, number

REWRITING: tuple[str, ...] = ("pissa", "olora", "corda")
"""Starts that take their product off the weights."""

FROM_DATA: tuple[str, ...] = ("eva", "corda")
"""Starts that are made from samples of the stage."""

MADE: tuple[str, ...] = ("pissa", "olora", "corda", "eva")
"""Starts that are made from the whole model before training, instead of drawn."""


class Lora(Strict):
    """Low-rank additions to frozen matrices, W + (alpha / r) B A, through PEFT (Hu et al., arXiv:2106.09685)."""

    mergeable: ClassVar[bool] = True
    zero: ClassVar[int] = 3

    type: Literal["lora"]
    """Kind of adapter."""
    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int = Field(default=32, ge=1)
    """The addition is multiplied by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the addition, while training."""
    rslora: bool = False
    """Multiply by `alpha / sqrt(r)` instead (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn the length of the weight's rows apart from their direction (DoRA, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda"] = "default"
    """Start of A and B. With all of them the stage starts from the parent's function.

    B A is zero: `default` (A uniform, B zero), `gaussian` (A normal, B zero), `orthogonal` (both, with rows of one
    orthogonal matrix; needs an even `r`), `eva` (A the principal directions of what each layer sees on 64 of the
    stage's samples, B zero; arXiv:2410.07170).

    B A is taken from the weight, and the rest of it stays frozen: `pissa` (largest singular values, arXiv:2404.02948),
    `olora` (QR, arXiv:2406.01775), `corda` (singular values weighted by what each layer sees on 64 samples,
    arXiv:2406.05223). What the stage leaves is a LoRA of rank `2 r` on the parent as it is. Linear layers only."""
    pissa_iterations: int = Field(default=0, ge=0)
    """Iterations of the fast decomposition of `init: pissa` (PEFT's `pissa_niter_N`); 0: the exact one."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354, proposes 16)."""
    targets: list[str] = Field(default=["language.attention", "language.ffn"], min_length=1)
    """What is adapted: parts (`language`, `language.attention`, `language.ffn`, `vision`, `vision.attention`,
    `vision.ffn`, `connector`, `fusion`, `moe.experts`, `moe.router`) or patterns of layer names (`q_proj`,
    `model.language_model.layers.1.*`). `moe.experts` adapts the experts of the stacks, each with its own A and B."""
    experts: Literal["all"] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = "all"
    """Which experts of the stacks are adapted: `all` (and the shared expert), or their indices. The others have no A
    and B and stay as they are to the bit."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        targets = names(raw.get("targets"))
        stacked = [i for i, target in enumerate(targets) if target.startswith("moe.")]
        for i in stacked[:1]:
            forbidden = [
                option
                for option, is_set in (
                    ("dropout", bool(number(raw.get("dropout", 0)))),
                    ("dora: true", raw.get("dora") is True),
                    (f"init: {raw.get('init')}", raw.get("init") in ("orthogonal", *MADE)),
                )
                if is_set
            ]
            if forbidden:
                yield (
                    ("targets", i),
                    f"{targets[i]!r} is adapted through PEFT's target_parameters, which cannot do "
                    f"{', '.join(forbidden)}: leave that out, or adapt experts and routers in a stage of their own",
                )
        for i, target in enumerate(targets):
            if target in targets[:i]:
                yield ("targets", i), f"target {target!r} is named twice"
        rank = number(raw.get("r", 16))
        if raw.get("init") == "orthogonal" and rank is not None and rank % 2:
            yield ("init",), f"'init: orthogonal' needs an even r, got {rank:g}"
        if raw.get("pissa_iterations") and raw.get("init") != "pissa":
            yield ("pissa_iterations",), "only 'init: pissa' has iterations"
        experts = raw.get("experts", "all")
        if isinstance(experts, list):
            targets = targets if "targets" in raw else cls.model_fields["targets"].default
            if targets and not any("expert" in target or "*" in target for target in targets):
                yield ("experts",), "no target names experts that could be chosen: add 'moe.experts'"
            for i, expert in enumerate(experts):
                if expert in experts[:i]:
                    yield ("experts", i), f"expert {expert} is named twice"
