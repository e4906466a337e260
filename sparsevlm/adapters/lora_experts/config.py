"""Settings of the mixture of LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

METHOD = "LORA_EXPERTS"
"""Name in PEFT's tables and in ``adapter_config.json``."""

GROUP = "lora_experts"
"""Name of the routers of the default adapter in losses, metrics and reports."""

_ROUTING = (
    "num_experts", "num_experts_per_tok", "scoring_func", "norm_topk_prob", "capacity_factor", "eval_capacity_factor",
    "bias_update_rate", "router_aux_loss_coef", "aux_loss_reduction", "aux_loss_count", "aux_loss_scope",
    "router_z_loss_coef",
)  # fmt: skip
"""Settings that routing is judged by, named as in the `moe` field of a model's config."""


@dataclass
class LoraExpertsConfig(PeftConfig):
    """Settings of a mixture of LoRA experts. Names are those of a model's `moe` where they mean the same.

    Args:
        num_experts: Experts an FFN; each is a low-rank addition to every linear layer of it.
        num_experts_per_tok: Experts that a token is sent to.
        r: Rank of an expert.
        lora_alpha: The additions are multiplied by ``lora_alpha / r``.
        use_rslora: By ``lora_alpha / sqrt(r)`` instead.
        lora_dropout: Dropout on the input of the additions.
        layers: Layers of the language model: a word of `sparsevlm.surgery.resolve_layers` or indices. A word leaves
            out those that hold MoE blocks.
        scoring_func: See `sparsevlm.moe.router.TopKRouter`, as for the next four.
        norm_topk_prob: As there.
        router_init_std: As there.
        router_jitter_noise: As there.
        bias_update_rate: Above 0 the routers have a balance bias, which `sparsevlm.train.balance` moves.
        router_init: ``normal`` or ``zero``.
        capacity_factor: See `sparsevlm.moe.capacity.Capacity`, as for the next three.
        eval_capacity_factor: As there.
        min_capacity: As there.
        drop_policy: As there.
        router_aux_loss_coef: Weight of the load-balancing loss, which our models add to theirs.
        aux_loss_reduction: See `sparsevlm.moe.losses.load_balancing_loss`, as for the next two.
        aux_loss_count: As there.
        aux_loss_scope: As there.
        router_z_loss_coef: Weight of the z-loss.
        modules_to_save: Further modules that train in full and are saved with the adapter (the connector).
        routed_layers: Filled in when the adapter is put in: the decoder layers that have experts, in order.
        target_modules: Filled in from the layers; not to be given.

    Raises:
        ValueError: A value out of its range.
    """

    num_experts: int = 4
    num_experts_per_tok: int = 2
    r: int = 16
    lora_alpha: int = 32
    use_rslora: bool = False
    lora_dropout: float = 0.0
    layers: str | list[int] = "all"
    scoring_func: Literal["softmax", "topk_softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    router_init: Literal["normal", "zero"] = "normal"
    router_init_std: float = 0.02
    router_jitter_noise: float = 0.0
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    drop_policy: Literal["position", "probability"] = "position"
    router_aux_loss_coef: float = 0.01
    aux_loss_reduction: Literal["mean", "sum"] = "mean"
    aux_loss_count: Literal["all", "first"] = "all"
    aux_loss_scope: Literal["device", "global"] = "device"
    router_z_loss_coef: float = 0.0
    modules_to_save: list[str] | None = None
    routed_layers: list[int] | None = field(default=None, repr=False)
    target_modules: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD  # type: ignore[assignment]  # PEFT's enum is closed; a plain string is as good a key
        k, experts = self.num_experts_per_tok, self.num_experts
        wrong = [
            f"{name} is {getattr(self, name)!r}, expected {expected}"
            for name, expected, right in (
                ("num_experts", "2 or more", experts >= 2),
                ("num_experts_per_tok", f"1 to num_experts = {experts}", 1 <= k <= experts),
                ("r", "1 or more", self.r >= 1),
                ("lora_dropout", "at least 0 and less than 1", 0 <= self.lora_dropout < 1),
                (
                    "scoring_func",
                    "softmax, topk_softmax or sigmoid",
                    self.scoring_func in ("softmax", "topk_softmax", "sigmoid"),
                ),
                ("router_init", "normal or zero", self.router_init in ("normal", "zero")),
                (
                    "bias_update_rate",
                    "0, or scoring_func='sigmoid'",
                    self.bias_update_rate == 0 or self.scoring_func == "sigmoid",
                ),
                ("router_aux_loss_coef", "0 or more", self.router_aux_loss_coef >= 0),
                ("router_z_loss_coef", "0 or more", self.router_z_loss_coef >= 0),
                ("target_modules", "None: choose with layers", self.target_modules is None),
            )
            if not right
        ]
        if wrong:
            raise ValueError("LoraExpertsConfig: " + "; ".join(wrong))

    @property
    def scaling(self) -> float:
        """Factor on what the experts add."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def router_group(self, adapter_name: str) -> tuple[str, dict[str, Any]]:
        """Return the name of an adapter's routers and what `sparsevlm.moe.groups` keeps of them."""
        settings = {name: getattr(self, name) for name in _ROUTING}
        return group_name(adapter_name), {"layers": list(self.routed_layers or []), **settings}

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved; the targets follow from the layers when it is loaded."""
        return {**super().to_dict(), "target_modules": None}


def group_name(adapter_name: str) -> str:
    """Return the name of an adapter's routers: the default one needs no addition."""
    return GROUP if adapter_name == "default" else f"{GROUP}.{adapter_name}"
