"""The MoE sections of a recipe: how a dense language model becomes sparse, and how its tokens are routed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Strict, number, view

LayerChoice = Literal["alternate", "all", "first_half", "second_half"] | list[int]


class Router(Strict):
    """How tokens choose experts."""

    scoring: Literal["softmax", "topk_softmax", "sigmoid", "modality"] = "softmax"
    """`softmax`: over all experts, then the best k (Mixtral, MoE-LLaVA). `topk_softmax`: the best k, then a softmax
    over those; the same weights as `softmax` renormalised. `sigmoid`: each expert by itself (DeepSeek-V3); the balance
    bias counts for the choice, not for the weight. `modality`: nothing is learned, text goes to expert 0 and visual
    tokens to expert 1, the FFN of CogVLM's visual expert; with `experts: 2`, `top_k: 1` and `aux_loss_coef: 0`."""
    norm_topk_prob: bool = True
    """Divide the k weights by their sum. Without it a layer of equal experts no longer computes what the dense one
    did: the start is not function-preserving."""
    init: Literal["normal", "zero", "kmeans"] = "normal"
    """Start of the router: small random numbers, zeros, or the centroids of the layer's inputs on a sample of the
    stage's data. All are function-preserving. With `zero` the first experts stay copies of one another, router rows
    and all, unless noise, fresh units or several models tell them apart."""
    init_std: float = Field(default=0.02, ge=0)
    """Standard deviation of `normal`; root mean square of the rows of `kmeans`."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiply the router's input by random factors in [1 - jitter, 1 + jitter] while training (Switch)."""
    bias_update_rate: float = Field(default=0.0, ge=0)
    """Step of the balance bias: after each optimizer step it rises for experts below the mean load and falls for those
    above, without a loss (DeepSeek-V3 uses 0.001). 0: no bias. Set `aux_loss_coef: 0` beside it, or both balance."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Tokens an expert takes at most while training, as a multiple of its fair share; the rest skip it. Default:
    dropless."""
    eval_capacity_factor: float | None = Field(default=None, gt=0)
    """The same outside training. Default: dropless."""
    min_capacity: int = Field(default=4, ge=0)
    """An expert takes at least so many tokens, whatever the factor."""
    drop: Literal["position", "probability"] = "position"
    """Whom a full expert turns away: the later tokens (DeepSpeed, MoE-LLaVA) or those of least weight."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        rate = number(raw.get("bias_update_rate", 0.0))
        if rate and raw.get("scoring", "softmax") != "sigmoid":
            yield ("bias_update_rate",), "a balance bias needs 'scoring: sigmoid'"
        if raw.get("scoring") == "modality":
            why = "is about a learned router, and 'scoring: modality' goes by what a token is: leave it out"
            for option in ("init", "jitter", "capacity_factor", "eval_capacity_factor"):
                if option in raw and raw[option] != cls.model_fields[option].default:
                    yield (option,), f"{option!r} {why}"


def routed_layer_faults(raw: dict[str, Any]) -> Iterator[CrossFault]:
    """Yield what is wrong with `experts`, `top_k` and `layers` of a section that puts routed experts into layers."""
    top_k, experts = number(raw.get("top_k", 2)), number(raw.get("experts", 4))
    if top_k is not None and experts is not None and top_k > experts:
        at = "top_k" if "top_k" in raw else "experts"
        yield (at,), f"top_k {top_k} is more than the {experts} experts"
    yield from layer_faults(raw)


def layer_faults(raw: dict[str, Any]) -> Iterator[CrossFault]:
    """Yield what is wrong with a list of `layers`."""
    layers = raw.get("layers")
    if isinstance(layers, list):
        if not layers:
            yield ("layers",), "names no layer"
        for i, layer in enumerate(layers):
            if layer in layers[:i]:
                yield ("layers", i), f"layer {layer} is named twice"


def _modality_faults(raw: dict[str, Any]) -> Iterator[CrossFault]:
    """Yield what does not go with experts by modality."""
    wanted = (
        ("experts", 4, 2),
        ("top_k", 2, 1),
        ("granularity", 1, 1),
        ("aux_loss_coef", 0.01, 0),
        ("z_loss_coef", 0, 0),
    )
    for option, default, only in wanted:
        if number(raw.get(option, default)) not in (only, None):
            at = (option,) if option in raw else ("router", "scoring")
            yield (
                at,
                f"one expert for text and one for visual tokens, and nothing to learn or balance: set {option}: {only}",
            )


class Upcycle(Strict):
    """Copies dense FFNs into routed experts before the stage trains (MoE-LLaVA stage 3)."""

    layers: LayerChoice = "alternate"
    """Decoder layers that become MoE: `alternate` (0, 2, 4, …), `all`, a half, or a list of indices."""
    experts: int = Field(default=4, ge=2, le=4096)
    """Experts a layer, each as wide as the FFN (see `granularity`)."""
    top_k: int = Field(default=2, ge=1)
    """Experts a token is sent to."""
    granularity: int = Field(default=1, ge=1)
    """Cut each expert into so many narrower ones: `experts` times as many are there and `top_k` times as many are
    used, at the same cost. Virtual groups keep the start function-preserving."""
    shared_expert: Literal["none", "residual", "gated"] = "none"
    """An FFN that every token passes as well. `residual`: the dense FFN, mixed with the experts by a learned weight
    (DeepSpeed's residual MoE). `gated`: a copy that adds nothing at first (Qwen2-MoE). Both are function-preserving."""
    noise_std: float = Field(default=0.0, ge=0)
    """Noise added to each expert's weights, as a share of their standard deviation. Above 0 the start is not
    function-preserving."""
    drop_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of each expert's hidden units that starts afresh, drawn with the weights' mean and deviation
    (drop-upcycling). Above 0 the start is not function-preserving."""
    experts_from: list[str] = []
    """Models whose FFNs become the experts, one each (branch-train-mix); all other weights become the mean of these
    models. Function-preserving only where they are equal. Default: copies of the stage's own FFNs."""
    router: Router = Router()
    """How tokens choose experts."""
    aux_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss."""
    aux_loss_reduction: Literal["mean", "sum"] = "mean"
    """Over MoE layers. `sum` is MoE-LLaVA's: its coefficient means as many times more as there are layers."""
    aux_loss_count: Literal["all", "first"] = "all"
    """Choices whose balance is asked for: `all` of a token's (the loss is `top_k * granularity` when balanced), or the
    `first` alone (1 when balanced; GShard, MoE-LLaVA)."""
    aux_loss_scope: Literal["device", "global"] = "device"
    """Tokens over which balance is asked for: each rank's own rows, or those of all ranks (which leaves experts free
    to specialise on what is rare in one row)."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss, which keeps logits small (ST-MoE uses 0.001)."""
    experts_implementation: str = "auto"
    """Kernel of the experts: `auto` (the fastest for the device and type), `grouped_mm`, `batched_mm`, `eager`,
    `megablocks`, or a name registered with transformers."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from routed_layer_faults(raw)
        experts = number(raw.get("experts", 4))
        sources = raw.get("experts_from")
        if isinstance(sources, list) and sources and experts is not None and len(sources) != experts:
            yield ("experts_from",), f"names {len(sources)} models for {experts:g} experts; give one an expert"
        if isinstance(sources, list) and sources and number(raw.get("granularity", 1)) not in (1, None):
            yield ("granularity",), "'experts_from' gives whole FFNs: leave granularity at 1"
        if view(raw.get("router")).get("scoring") == "modality":
            yield from _modality_faults(raw)
        if raw.get("aux_loss_count") == "first" and number(raw.get("granularity", 1)) not in (1, None):
            yield (
                ("aux_loss_count",),
                "the narrow experts of a copy tie at the start, so that only one of them is ever first: with "
                "granularity count 'all'",
            )
