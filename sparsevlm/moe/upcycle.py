"""Sparse upcycling: routed experts made from trained dense FFNs, behind a fresh router.

Legend: H width, I intermediate width, E experts (shards counted), k experts a token, S probe tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsevlm.moe.backends import GPU_ONLY
from sparsevlm.moe.block import SparseMoeBlock, moe_config, set_implementation
from sparsevlm.moe.expand import (
    layer_start,
    mixing_weights,
    moe_fields,
    preserves_function,
    routed_weights,
    shared_weights,
)
from sparsevlm.moe.ffn import FfnLayout, expert_weights, read_layout
from sparsevlm.moe.modality import telling_apart
from sparsevlm.moe.router import mark_initialized
from sparsevlm.surgery import decoder_layers, replace_submodules, resolve_layers

if TYPE_CHECKING:
    from sparsevlm.recipe.moe import Upcycle

PROBE_TOKENS = 16
"""Random tokens on which every new layer is compared with the FFN it was made from."""


@dataclass(frozen=True)
class UpcycleReport:
    """What upcycling did to a language model.

    Attributes:
        layers: Decoder layers that are MoE now.
        num_experts: E.
        num_experts_per_tok: k.
        experts_implementation: Kernel that runs the experts.
        parameters_before: Parameters of the language model when it was dense.
        parameters_after: Parameters now.
        parameters_activated: Parameters that one token uses: k of E experts, and all else.
        preserves_function: Whether the start is to compute what the dense model did.
        reason: Why, or why not.
        max_ffn_difference: Largest absolute difference between a new layer and its FFN on random tokens; None on the
            meta device.
    """

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    experts_implementation: str
    parameters_before: int
    parameters_after: int
    parameters_activated: int
    preserves_function: bool
    reason: str
    max_ffn_difference: float | None


def upcycle_language_model(
    language_model: nn.Module,
    text_config: Any,
    spec: Upcycle,
    *,
    seed: int = 0,
    sources: Mapping[int, Sequence[Mapping[str, Tensor]]] | None = None,
    centroids: Mapping[int, Tensor] | None = None,
) -> tuple[dict[str, Any], UpcycleReport]:
    """Replace the FFNs of chosen layers by routed experts, in place.

    What the experts and the router start from is `expand.py`'s. Layer by layer, so that at most one FFN is held twice;
    a shared expert is the FFN module itself.

    Args:
        language_model: Dense decoder with its weights, unsharded; or on the meta device, for its shapes.
        text_config: Its configuration; receives the fields that transformers and trl look for.
        spec: The recipe's `upcycle`.
        seed: Of everything that is drawn at random.
        sources: Of each layer the FFNs that become its experts, for `experts_from`.
        centroids: Of each layer ``(copies, H)``, for `router.init: kmeans`.

    Returns:
        The model config's `moe` field, from which `install_moe` rebuilds the blocks, and a report.

    Raises:
        ValueError: Already sparse, unknown layers, an FFN that is no plain or gated FFN, one that computes more than
            its projections say (found by probing), or a granularity that does not divide it.

    Source: Sparse Upcycling (arXiv:2212.05055), MoE-LLaVA stage 3; of each option, see `expand_ffn`. *Deviations*:
    router drawn from N(0, std), weights renormalised also for k = 1.
    """
    if any(isinstance(module, SparseMoeBlock) for module in language_model.modules()):
        raise ValueError("the language model already has MoE layers; upcycle a dense one")
    layers = decoder_layers(language_model)
    indices = resolve_layers(spec.layers, len(layers))
    moe = moe_fields(spec, indices, _intermediate_size(layers, indices, text_config, spec))
    preserves, reason = preserves_function(spec)
    kernel_config = getattr(language_model, "config", text_config)
    before = _count(language_model)
    # Of the probe alone: each layer's weights come from a generator of their own.
    generator = torch.Generator().manual_seed(seed % 2**63)
    differences: list[float] = []

    def build(index: int, ffn: nn.Module) -> SparseMoeBlock:
        layout = read_layout(ffn, text_config)
        source = expert_weights(ffn, layout)
        reference = source["down_proj"]
        shared = {"shared_expert": ffn} if spec.shared_expert != "none" else {}
        with torch.device("meta"):
            block = SparseMoeBlock(moe_config(layout, text_config, moe), kernel_config, **shared)
        for name, child in block.named_children():
            if name != "shared_expert":
                child.to(reference.dtype).to_empty(device=reference.device)
        block.train(ffn.training)
        if reference.is_meta:
            return block
        tokens, dense = _probe(index, ffn, layout, source, generator)
        start = layer_start(
            source,
            spec,
            seed=seed,
            layer=index,
            sources=None if sources is None else sources[index],
            centroids=None if centroids is None else centroids[index],
        )
        _fill(block, ffn, layout, spec, *start)
        on_gpu = spec.experts_implementation in GPU_ONLY and not reference.is_cuda
        set_implementation(block, kernel_config, "eager" if on_gpu else spec.experts_implementation)
        differences.append(_compare(index, block, tokens, dense, preserves))
        return block

    replace_submodules(layers, indices, build)
    text_config.num_experts = moe["num_experts"]
    text_config.num_experts_per_tok = moe["num_experts_per_tok"]
    text_config.router_aux_loss_coef = spec.aux_loss_coef
    text_config.output_router_logits = True
    implementation = set_implementation(language_model, text_config, spec.experts_implementation)
    experts: int = moe["num_experts"]
    idle = sum(
        _count(layers[i].mlp.experts) // experts * (experts - moe["num_experts_per_tok"])  # pyright: ignore
        for i in indices
    )
    after = _count(language_model)
    report = UpcycleReport(
        layers=tuple(indices),
        num_experts=experts,
        num_experts_per_tok=moe["num_experts_per_tok"],
        experts_implementation=implementation,
        parameters_before=before,
        parameters_after=after,
        parameters_activated=after - idle,
        preserves_function=preserves,
        reason=reason,
        max_ffn_difference=max(differences, default=None),
    )
    return moe, report


def upcycle_model(
    model: Any,
    spec: Upcycle,
    *,
    seed: int = 0,
    sources: Mapping[int, Sequence[Mapping[str, Tensor]]] | None = None,
    centroids: Mapping[int, Tensor] | None = None,
) -> UpcycleReport:
    """Upcycle a `SparseVLMForConditionalGeneration` in place; its config then declares what was done.

    Args:
        model: Loaded model.
        spec: See `upcycle_language_model`.
        seed: See there.
        sources: See there.
        centroids: See there.

    Raises:
        ValueError: See there.
    """
    if spec.router.scoring == "modality" and (model.config.fusion or {}).get("type") == "gated_cross_attention":
        raise ValueError(
            "experts by modality need visual tokens in the text, and the model's fusion, gated cross-attention, keeps "
            "them beside it; take another router.scoring"
        )
    model.config.moe, report = upcycle_language_model(
        model.model.language_model,
        model.config.text_config,
        spec,
        seed=seed,
        sources=sources,
        centroids=centroids,
    )
    return report


@torch.no_grad()
def measure_difference(dense_fn: Callable[[], Tensor], moe_fn: Callable[[], Tensor]) -> float:
    """Return the largest absolute difference between two models' outputs.

    Upcycling works in place, so keep the dense output: ``before = dense(); upcycle(); measure(lambda: before, moe)``.

    Args:
        dense_fn: Gives the dense model's logits.
        moe_fn: Gives the sparse model's, of the same shape.
    """
    dense, moe = dense_fn(), moe_fn()
    assert dense.shape == moe.shape, f"{tuple(dense.shape)} against {tuple(moe.shape)}"
    return float((dense.double() - moe.double()).abs().max())


def _intermediate_size(layers: nn.ModuleList, indices: Sequence[int], text_config: Any, spec: Upcycle) -> int:
    """Return the width of the chosen layers' FFNs, having looked at each of them.

    Raises:
        ValueError: They differ and are to be cut: the config holds one width of shards for all layers.
    """
    widths = {
        i: read_layout(ffn, text_config).intermediate_size
        for i in indices
        if isinstance(ffn := getattr(layers[i], "mlp", None), nn.Module)  # else `replace_submodules` says so
    }
    if len(set(widths.values())) > 1 and spec.granularity > 1:
        raise ValueError(
            f"layers have FFNs of different widths ({widths}): leave granularity at 1, or choose layers of one width"
        )
    return next(iter(widths.values()), spec.granularity)


@torch.no_grad()
def _fill(
    block: SparseMoeBlock,
    ffn: nn.Module,
    layout: FfnLayout,
    spec: Upcycle,
    router: Tensor,
    stacks: Mapping[str, Tensor],
) -> None:
    """Write a layer's start into a block that was allocated without values."""
    weights = routed_weights(spec, router, stacks)
    weights |= mixing_weights(spec, layout.hidden_size)
    shared = shared_weights(spec, dict(ffn.named_parameters()), layout.down)
    weights |= {f"shared_expert.{name}": weight for name, weight in shared.items()}
    own = dict(block.named_parameters())
    assert own.keys() == weights.keys(), f"{sorted(own)} against {sorted(weights)}"
    for name, parameter in own.items():
        if parameter is not weights[name]:
            parameter.copy_(weights[name])
    mark_initialized(block)


@torch.no_grad()
def _probe(
    index: int, ffn: nn.Module, layout: FfnLayout, source: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return random tokens ``(1, S, H)`` and what the FFN makes of them.

    Raises:
        ValueError: Its projections and activation alone make something else: shapes do not show everything that an
            FFN's forward may do.
    """
    down = source["down_proj"]
    tokens = torch.randn(1, PROBE_TOKENS, layout.hidden_size, generator=generator).to(down.device, down.dtype)
    training = [module.training for module in ffn.modules()]
    dense = ffn.eval()(tokens)
    for module, mode in zip(ffn.modules(), training, strict=True):
        module.training = mode
    up = "gate_up_proj" if layout.gated else "up_proj"
    x = F.linear(tokens, source[up], source.get(f"{up}_bias"))  # (1, S, 2I | I)
    act = ACT2FN[layout.hidden_act]
    if layout.gated:
        gate, x = x.chunk(2, dim=-1)
        x = act(gate) * x
    else:
        x = act(x)
    difference = _difference(F.linear(x, down, source.get("down_proj_bias")), dense)
    if not difference <= (allowed := _allowed(dense)):
        raise ValueError(
            f"decoder layer {index}: experts copied from {type(ffn).__name__} differ from it by {difference:.3g} "
            f"(allowed {allowed:.1g}), so its forward does more than its projections and activation say; leave this "
            "layer dense"
        )
    return tokens, dense


@torch.no_grad()
def _compare(index: int, block: SparseMoeBlock, tokens: Tensor, dense: Tensor, preserves: bool) -> float:
    """Return how far a new layer is from its FFN.

    Raises:
        ValueError: Farther than rounding, although its options say that it is not.
    """
    training = [module.training for module in block.modules()]
    apart = torch.arange(tokens.shape[1]) % 2 == 1  # for experts by modality
    with telling_apart(block, apart.to(tokens.device)):
        difference = _difference(block.eval()(tokens), dense)
    for module, mode in zip(block.modules(), training, strict=True):
        module.training = mode
    if preserves and not difference <= (allowed := _allowed(dense)):
        raise ValueError(
            f"decoder layer {index}: the experts differ from the FFN they were made from by {difference:.3g} (allowed "
            f"{allowed:.1g}); leave this layer dense, or report the language model"
        )
    return difference


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((a.double() - b.double()).abs().max())


def _allowed(dense: Tensor) -> float:
    """Return the rounding allowed: units in the last place, of a sum over thousands of terms in float32, of few
    roundings in half precision."""
    units = 64 if dense.dtype == torch.float32 else 16
    return units * torch.finfo(dense.dtype).eps * max(1.0, float(dense.abs().max()))


def _count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
