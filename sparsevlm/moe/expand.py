"""From one dense FFN to the start of a routed layer, as arithmetic on tensors.

Used in memory (`upcycle.py`) and shard by shard on files; both draw the same numbers, since every layer has a generator
of its own, from which first the router is drawn and then the experts (`layer_start`).

Legend: H width, I intermediate width, E copies of the FFN, G shards a copy is cut into, k copies a token is sent to.
Expert ``e * G + s`` is shard s of copy e. Weights come in the layout of `ffn.expert_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsevlm.recipe.moe import Upcycle

ALIGNED = 8
"""Shards as wide as a multiple of this keep the rows of `grouped_mm` aligned in two-byte types."""


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """Return the generator of one layer's random numbers, on the host: the same whatever device, type and order.

    Args:
        seed: Of the run.
        layer: Index of the decoder layer.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def layer_start(
    weights: Mapping[str, Tensor],
    spec: Upcycle,
    *,
    seed: int,
    layer: int,
    sources: Sequence[Mapping[str, Tensor]] | None = None,
    centroids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the router's weight ``(E * G, H)`` float32 and the experts' stacks of one layer.

    Args:
        weights: The dense FFN.
        spec: The recipe's `upcycle`.
        seed: Of the run.
        layer: Index of the decoder layer.
        sources: The FFNs of `experts_from`, one each.
        centroids: See `router_weight`.

    Raises:
        ValueError: See `expand_ffn` and `router_weight`.
    """
    generator = layer_generator(seed, layer)
    router = router_weight(spec, weights["down_proj"].shape[0], generator, centroids)
    return router, expand_ffn(weights, spec, generator, sources)


def expand_ffn(
    weights: Mapping[str, Tensor],
    spec: Upcycle,
    generator: torch.Generator,
    sources: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the stacks of E * G experts, each tensor of ``weights`` with a leading dimension.

    The k G weights of a token sum to 1 and a copy's shards share their weight, so a copy's shards weigh 1/G of it: the
    projection back is multiplied by G. Its bias is not: all G shards of a copy add it, each at 1/G.

    Args:
        weights: The dense FFN: ``gate_up_proj`` (2I, H) or ``up_proj`` (I, H), ``down_proj`` (H, I), and their biases.
        spec: Copies, granularity, noise and share to start afresh.
        generator: Where random numbers come from (none are drawn for plain copies).
        sources: FFNs that become the copies, one each, instead of ``weights``.

    Raises:
        ValueError: See `split_ffn`; or the sources are not E FFNs of the same shape.

    Source: Sparse Upcycling (arXiv:2212.05055); virtual groups, arXiv:2410.07524 section 3; drop-upcycling,
    arXiv:2502.19261 section 3; branch-train-mix, arXiv:2403.07816. *Deviations*: the shards' scale goes into the
    projection back alone (2410.07524 spreads it over all); drop-upcycling redraws from the statistics of the whole
    matrix, gate, up and down each, and redraws the units' biases too.
    """
    copies = [weights] * spec.experts if sources is None else list(sources)
    if len(copies) != spec.experts:
        raise ValueError(f"{len(copies)} models were given for {spec.experts} experts; give one an expert")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for i, copy in enumerate(copies):
        found = {name: tuple(weight.shape) for name, weight in copy.items()}
        if found != shapes:
            raise ValueError(f"the FFN of model {i} in 'experts_from' has the shapes {found}, the stage's own {shapes}")
    group = spec.granularity
    shard_width(weights["down_proj"].shape[1], group)
    stacks: dict[str, Tensor] = {}
    for i, copy in enumerate(copies):
        for name, shards in split_ffn(_diversify(copy, spec, generator), group).items():
            if name not in stacks:
                stacks[name] = weights[name].new_empty(spec.experts * group, *shards.shape[1:])
            stacks[name][i * group : (i + 1) * group] = shards
    return stacks


def shard_width(intermediate_size: int, granularity: int) -> int:
    """Return I / G.

    Raises:
        ValueError: G does not divide I.
    """
    if intermediate_size % granularity == 0:
        return intermediate_size // granularity
    divisors = [g for g in range(2, min(intermediate_size, 256) + 1) if intermediate_size % g == 0]
    aligned = [g for g in divisors if intermediate_size // g % ALIGNED == 0]
    hint = f"; {_few(aligned)} leave shards that are a multiple of {ALIGNED} wide, as fast kernels want" * bool(aligned)
    raise ValueError(
        f"granularity {granularity} does not divide the FFN's {intermediate_size} hidden units; what does is "
        f"{_few(divisors) or 'only 1'}{hint}"
    )


def split_ffn(weights: Mapping[str, Tensor], granularity: int) -> dict[str, Tensor]:
    """Cut an FFN into G narrower ones ``(G, ...)`` of adjacent hidden units, whose mean is the FFN's output.

    Raises:
        ValueError: The granularity does not divide I, or G times a weight is too large for float16.
    """
    up, parts = _up(weights)
    width, intermediate = weights["down_proj"].shape
    narrow = shard_width(intermediate, granularity)
    shards = {}
    for name in (up, f"{up}_bias"):
        if name in weights:
            rest = weights[name].shape[1:]
            shards[name] = (
                weights[name]
                .reshape(parts, granularity, narrow, *rest)
                .transpose(0, 1)
                .reshape(granularity, parts * narrow, *rest)
            )  # (G, 2I/G | I/G, H) or without H
    down = weights["down_proj"].reshape(width, granularity, narrow).transpose(0, 1)  # (G, H, I/G)
    shards["down_proj"] = down * granularity if granularity > 1 else down
    if granularity > 1 and down.dtype == torch.float16 and not bool(shards["down_proj"].isfinite().all()):
        raise ValueError(
            f"granularity {granularity} multiplies the FFN's projection back, whose largest weight is "
            f"{float(down.abs().max()):g}, beyond what float16 holds; start from the model in bfloat16 or float32"
        )
    if "down_proj_bias" in weights:
        shards["down_proj_bias"] = weights["down_proj_bias"].expand(granularity, -1)  # (G, H)
    return shards


def router_weight(
    spec: Upcycle, hidden_size: int, generator: torch.Generator, centroids: Tensor | None = None
) -> Tensor:
    """Return the router's start ``(E * G, H)`` float32; the G rows of a copy are equal.

    Args:
        spec: `router.init` and its scale.
        hidden_size: H.
        generator: Of `normal`.
        centroids: ``(E, H)`` centroids of the layer's inputs, for `kmeans`. Their mean is taken off, since it says
            nothing about the choice, and each row is scaled to a root mean square of `init_std`: no copy wins for being
            far out.

    Raises:
        ValueError: `kmeans` without centroids.
    """
    router = spec.router
    if router.init == "kmeans":
        if centroids is None:
            raise ValueError("router init 'kmeans' needs a sample of the layer's inputs; use 'normal' or 'zero'")
        assert centroids.shape == (spec.experts, hidden_size), f"{tuple(centroids.shape)}"
        rows = centroids.float() - centroids.float().mean(dim=0)
        rms = rows.square().mean(dim=1, keepdim=True).sqrt()
        rows = torch.where(rms > 0, rows / rms.clamp(min=torch.finfo(torch.float32).tiny), rows) * router.init_std
    elif router.init == "zero":
        rows = torch.zeros(spec.experts, hidden_size)
    else:
        rows = torch.empty(spec.experts, hidden_size).normal_(std=router.init_std, generator=generator)
    return rows.repeat_interleave(spec.granularity, dim=0)


def routed_weights(spec: Upcycle, router: Tensor, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the start of router and experts by their names in the block; routing by modality has no weight."""
    learned = {} if spec.router.scoring == "modality" else {"gate.weight": router}
    return learned | {f"experts.{name}": stack for name, stack in stacks.items()}


def shared_weights(spec: Upcycle, weights: Mapping[str, Tensor], down: str) -> dict[str, Tensor]:
    """Return the start of the shared expert, which is the dense FFN module, under the FFN's own names.

    Args:
        spec: The kind of shared expert.
        weights: The FFN's parameters by their names in it (``down_proj.weight``, …).
        down: Name of the projection back (``down_proj``; `FfnLayout.down`).

    Returns:
        `residual`: the FFN. `gated`: the FFN with a projection back of zeros, so that it adds nothing, whatever the
        gate says, and yet learns from the first step. `none`: nothing.
    """
    if spec.shared_expert == "none":
        return {}
    silent = spec.shared_expert == "gated"
    assert any(name.startswith(f"{down}.") for name in weights), f"no {down} in {sorted(weights)}"
    return {
        name: torch.zeros_like(weight) if silent and name.startswith(f"{down}.") else weight
        for name, weight in weights.items()
    }


def mixing_weights(spec: Upcycle, hidden_size: int) -> dict[str, Tensor]:
    """Return the start of what mixes shared and routed experts, by its name in the block (float32).

    Zeros: `residual` starts half and half for every token, `gated` half open.
    """
    if spec.shared_expert == "gated":
        return {"shared_expert_gate.weight": torch.zeros(1, hidden_size)}
    if spec.shared_expert == "residual":
        return {"coefficient.weight": torch.zeros(2, hidden_size), "coefficient.bias": torch.zeros(2)}
    return {}


def moe_fields(spec: Upcycle, layers: Sequence[int], intermediate_size: int) -> dict[str, Any]:
    """Return the model config's `moe` field.

    Args:
        spec: The recipe's `upcycle`.
        layers: Indices of the layers that become MoE.
        intermediate_size: I of the dense FFN.

    Raises:
        ValueError: The granularity does not divide I.
    """
    narrow = shard_width(intermediate_size, spec.granularity)
    router = spec.router
    return {
        "layers": list(layers),
        "num_experts": spec.experts * spec.granularity,
        "num_experts_per_tok": spec.top_k * spec.granularity,
        # None: as wide as the layer's own FFN, which differs from layer to layer in some decoders.
        "moe_intermediate_size": narrow if spec.granularity > 1 else None,
        "shared_expert": spec.shared_expert,
        "scoring_func": router.scoring,
        "norm_topk_prob": router.norm_topk_prob,
        "router_init_std": router.init_std,
        "router_jitter_noise": router.jitter,
        "bias_update_rate": router.bias_update_rate,
        "capacity_factor": router.capacity_factor,
        "eval_capacity_factor": router.eval_capacity_factor,
        "min_capacity": router.min_capacity,
        "drop_policy": router.drop,
        "router_aux_loss_coef": spec.aux_loss_coef,
        "aux_loss_reduction": spec.aux_loss_reduction,
        "aux_loss_count": spec.aux_loss_count,
        "aux_loss_scope": spec.aux_loss_scope,
        "router_z_loss_coef": spec.z_loss_coef,
        "experts_implementation": spec.experts_implementation,
    }


def preserves_function(spec: Upcycle) -> tuple[bool, str]:
    """Tell whether the sparse model computes at first what the dense one did (outside training), and why.

    Args:
        spec: The recipe's `upcycle`.

    Returns:
        The answer, and the reason in words that can follow "the start is (not) function-preserving: ".
    """
    router, against = spec.router, []
    if spec.experts_from:
        against.append("experts and all other weights come from other models (experts_from)")
    if spec.noise_std > 0:
        against.append(f"noise is added to the experts (noise_std {spec.noise_std:g})")
    if spec.drop_ratio > 0:
        against.append(f"hidden units start afresh (drop_ratio {spec.drop_ratio:g})")
    if not _weights_sum_to_one(spec):
        against.append(f"the weights of the chosen experts do not sum to 1 (scoring {router.scoring}, not normalised)")
    if router.eval_capacity_factor is not None and router.eval_capacity_factor * spec.top_k < spec.experts:
        against.append(f"full experts may turn tokens away (eval_capacity_factor {router.eval_capacity_factor:g})")
    if against:
        return False, "; ".join(against)
    reason = "equal experts whose weights sum to 1"
    if spec.granularity > 1:
        reason = f"of every shard one copy is chosen ({spec.granularity} shards an FFN), and the weights sum to 1"
    if spec.shared_expert == "gated":
        reason += ", beside a shared expert that adds nothing at first"
    elif spec.shared_expert == "residual":
        reason += ", mixed with the same FFN by weights that sum to 1"
    if router.capacity_factor is not None and router.capacity_factor * spec.top_k < spec.experts:
        reason += f"; while training, full experts turn tokens away (capacity_factor {router.capacity_factor:g})"
    return True, reason


def _weights_sum_to_one(spec: Upcycle) -> bool:
    """Tell whether a token's weights sum to 1 at the start."""
    router = spec.router
    if router.norm_topk_prob or router.scoring in ("topk_softmax", "modality"):
        return True
    if router.scoring == "softmax":
        return spec.top_k == spec.experts
    flat = router.init == "zero" or router.init_std == 0
    return flat and spec.top_k * spec.granularity == 2  # two sigmoids of 0


def _diversify(weights: Mapping[str, Tensor], spec: Upcycle, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Return a copy of the FFN with noise and fresh hidden units; the FFN itself where neither is asked for."""
    if not (spec.noise_std or spec.drop_ratio):
        return weights
    up, parts = _up(weights)
    intermediate = weights["down_proj"].shape[1]
    # Hidden units last but for the width: (parts, I, H), (parts, I) and (1, I, H) are handled alike.
    units = {
        name: weights[name].float().cpu().unflatten(0, (parts, intermediate))
        for name in (up, f"{up}_bias")
        if name in weights
    }
    units["down_proj"] = weights["down_proj"].float().cpu().t()[None]
    scale = {name: [(part.mean(), part.std(correction=0)) for part in tensor] for name, tensor in units.items()}
    made = {name: tensor.clone() for name, tensor in units.items()}
    if spec.noise_std:
        for name in (up, "down_proj"):
            for part, (_, std) in zip(made[name], scale[name], strict=True):
                part.add_(torch.randn(part.shape, generator=generator), alpha=float(std) * spec.noise_std)
    if spec.drop_ratio:
        fresh = torch.randperm(intermediate, generator=generator)[: max(1, round(spec.drop_ratio * intermediate))]
        for name, tensor in made.items():
            for part, (mean, std) in zip(tensor, scale[name], strict=True):
                drawn = torch.randn((len(fresh), *part.shape[1:]), generator=generator)
                part[fresh] = drawn * std + mean
    result = dict(weights)
    for name, tensor in made.items():
        value = tensor[0].t() if name == "down_proj" else tensor.flatten(0, 1)
        result[name] = value.to(weights[name].device, weights[name].dtype)
    return result


def _up(weights: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the name of the projection(s) into the hidden units, and how many it holds."""
    return ("gate_up_proj", 2) if "gate_up_proj" in weights else ("up_proj", 1)


def _few(numbers: Sequence[int]) -> str:
    """List some numbers."""
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
