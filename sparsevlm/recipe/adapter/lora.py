"""`adapter: {type: lora}`: low-rank additions to frozen matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Strict, names, number


class Lora(Strict):
    """Low-rank additions to frozen matrices, W + (alpha / r) B A, through PEFT (Hu et al., arXiv:2106.09685)."""

    mergeable: ClassVar[bool] = True

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
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """Start of A and B: `default` (A uniform, B zero), `gaussian` (A normal, B zero), `orthogonal` (both, with rows of
    one orthogonal matrix, such that B A is zero; needs an even `r`). With all of them the stage starts from the
    parent's function. Those that change the parent's weights (PiSSA, OLoRA) are not offered."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354, proposes 16)."""
    targets: list[str] = Field(default=["language.attention", "language.ffn"], min_length=1)
    """What is adapted: parts (`language`, `language.attention`, `language.ffn`, `vision`, `vision.attention`,
    `vision.ffn`, `connector`, `moe.experts`, `moe.router`) or patterns of layer names (`q_proj`,
    `model.language_model.layers.1.*`). `moe.experts` adapts every expert of the stacks, each with its own A and B."""

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
                    ("init: orthogonal", raw.get("init") == "orthogonal"),
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
