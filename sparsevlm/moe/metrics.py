"""How tokens are spread over experts, layer by layer and by modality, and how far the experts have moved apart.

Sums come first (they add up over micro-batches, ranks and batches of an evaluation), numbers for people last.

Legend: S tokens, E experts, k experts a token, L MoE layers, M modalities, n weights of a matrix of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.moe.block import SparseMoeBlock
from sparsevlm.moe.groups import MOE

MODALITIES = ("text", "image", "video")
"""What a token stands for; its index is the number in `token_modality`."""

PADDING = -1
"""In `token_modality` and among the experts of a token: not there."""

CHUNK = 2**22
"""Numbers of the float32 copies that `weight_cosines` works on at a time (16 MB)."""


@dataclass(frozen=True)
class RoutingSums:
    """What adds up. All on one device, float64 (float32 where there is none).

    Attributes:
        tokens: ``(M,)`` real tokens.
        assigned: ``(L, M, E)`` tokens sent to each expert, dropped ones left out.
        entropy: ``(L, M)`` sum of the tokens' routing entropies, each over log E.
        dropped: ``(L,)`` choices that a full expert turned away.
        squares: ``(L,)`` sum of squared router logits.
    """

    tokens: Tensor
    assigned: Tensor
    entropy: Tensor
    dropped: Tensor
    squares: Tensor

    def __add__(self, other: RoutingSums) -> RoutingSums:
        return RoutingSums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def pack(self) -> Tensor:
        """Return all sums in one vector."""
        return torch.cat([value.flatten() for value in vars(self).values()])

    def unpack(self, packed: Tensor) -> RoutingSums:
        """Return sums of this one's shapes from `pack`'s vector."""
        parts = packed.split([value.numel() for value in vars(self).values()])
        return RoutingSums(*(part.view(value.shape) for part, value in zip(parts, vars(self).values(), strict=True)))


def token_modality(
    input_ids: Tensor, image_token_id: int, video_token_id: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Return each token's index into `MODALITIES`, -1 for padding, ``(S,)`` int64.

    Args:
        input_ids: S ids in any shape, visual tokens as placeholders. Views and slices count as images.
        image_token_id: Placeholder of pictures.
        video_token_id: Placeholder of videos.
        attention_mask: S numbers, 0 for padding.
    """
    ids = input_ids.reshape(-1)
    modality = (ids == image_token_id).long() + 2 * (ids == video_token_id).long()
    if attention_mask is not None:
        modality = modality.masked_fill(attention_mask.reshape(-1) == 0, PADDING)
    return modality


@torch.no_grad()
def measure_routing(
    router_logits: Sequence[Tensor], router_indices: Sequence[Tensor], modality: Tensor, scoring: str = "softmax"
) -> RoutingSums:
    """Sum up the routing of a batch, without waiting for the device.

    Args:
        router_logits: ``(S, E)`` a layer.
        router_indices: ``(S, k)`` a layer, -1 where the expert was full or the token is padding.
        modality: ``(S,)`` from `token_modality`.
        scoring: The router's; `sigmoid` probabilities are divided by their sum before their entropy is taken, and
            `modality` leaves nothing open.
    """
    exact = torch.float32 if modality.device.type == "mps" else torch.float64
    kinds = torch.arange(len(MODALITIES), device=modality.device)[:, None]
    member = (modality == kinds).to(exact)  # (M, S)
    real = member.sum(0)  # (S,)
    assigned, entropy, dropped, squares = [], [], [], []
    for logits, index in zip(router_logits, router_indices, strict=True):
        logits, index = logits.detach().float().to(modality.device), index.to(modality.device)
        experts = torch.arange(logits.shape[-1], device=modality.device)
        sent = (index[..., None] == experts).sum(1)  # (S, E)
        assigned.append(member @ sent.to(exact))
        entropy.append(member @ _entropy(logits, scoring).to(exact))
        dropped.append(real @ (index < 0).sum(-1).to(exact))
        squares.append(real @ logits.square().sum(-1).to(exact))
    return RoutingSums(
        member.sum(1), torch.stack(assigned), torch.stack(entropy), torch.stack(dropped), torch.stack(squares)
    )


def _entropy(logits: Tensor, scoring: str) -> Tensor:
    """Return the entropy of each token's distribution over experts, over log E: ``(S,)``."""
    if scoring == "modality":
        return logits.new_zeros(logits.shape[0])
    scores = F.logsigmoid(logits) if scoring == "sigmoid" else logits
    log_p = scores.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


def count_modalities(sums: RoutingSums) -> dict[str, int]:
    """Return the tokens of each modality that has any."""
    return {name: int(count) for name, count in zip(MODALITIES, sums.tokens.tolist(), strict=True) if count}


def effective_share(load: Sequence[float]) -> float:
    """Return how many experts the load is as good as spread evenly over, as a share of all: exp(entropy) / E.

    1 is even. Where all tokens take the same k experts it is k / E.
    """
    return math.exp(-sum(share * math.log(share) for share in load if share > 0)) / len(load)


def summarise_routing(sums: RoutingSums) -> list[dict[str, Any]]:
    """Return a layer's numbers, layer by layer.

    Returns:
        ``load`` (by ``all`` and each modality that has tokens: E shares of the assignments, summing to 1), ``balance``
        (`effective_share` of all), ``max_violation`` (largest load over the fair one, minus 1: 0 is even, E / k - 1
        collapse), ``dead_experts`` (experts without a token), ``entropy`` (by the same groups: mean entropy of a
        token's distribution, over log E: 1 is undecided, 0 sure), ``dropped_share`` (of the choices), ``logit_rms``.
    """
    tokens, experts = sums.tokens.tolist(), sums.assigned.shape[-1]
    total = max(sum(tokens), 1)
    layers = []
    for assigned, entropy, dropped, squares in zip(
        sums.assigned.tolist(), sums.entropy.tolist(), sums.dropped.tolist(), sums.squares.tolist(), strict=True
    ):
        made = sum(map(sum, assigned))
        load = {"all": _shares([sum(column) for column in zip(*assigned, strict=True)])}
        means = {"all": sum(entropy) / total}
        for name, count, row, summed in zip(MODALITIES, tokens, assigned, entropy, strict=True):
            if count:
                load[name], means[name] = _shares(row), summed / count
        layers.append(
            {
                "load": load,
                "balance": effective_share(load["all"]),
                "max_violation": max(load["all"]) * experts - 1,
                "dead_experts": load["all"].count(0.0),
                "entropy": means,
                "dropped_share": dropped / max(made + dropped, 1),
                "logit_rms": math.sqrt(squares / (total * experts)),
            }
        )
    return layers


def _shares(counts: Sequence[float]) -> list[float]:
    """Divide counts by their sum; zeros stay zeros."""
    total = max(sum(counts), 1)
    return [count / total for count in counts]


@torch.no_grad()
def weight_cosines(weights: Sequence[Tensor], gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the cosine between every two experts, each taken as one vector of all its matrices.

    Sums up Gram matrices of column chunks, so no expert is ever copied as a whole.

    Args:
        weights: Stacks ``(E, ...)``.
        gather: Puts the experts of all ranks that share them together, ``(e, n) -> (E, n)``; None where they are here.

    Returns:
        ``(E, E)`` float64, on the host.
    """
    gram: Tensor | float = 0.0
    for weight in weights:
        flat = weight.detach().flatten(1)  # (E, n)
        for chunk in flat.split(max(1, CHUNK // flat.shape[0]), dim=1):
            chunk = chunk.float() if gather is None else gather(chunk).float()
            gram = gram + (chunk @ chunk.T).double()
    assert isinstance(gram, Tensor), "no weights"
    norm = gram.diagonal().sqrt().clamp(min=1e-30)
    return (gram / norm / norm[:, None]).cpu()


def expert_similarity(model: nn.Module, group: str = MOE) -> list[Tensor]:
    """Return the cosines between the experts of each layer, in order, ``(E, E)`` float64 on the host.

    Of MoE layers `weight_cosines`, biases and shared experts left out, adapters included. Layers of another group of
    routers have a method ``expert_cosines()``, which returns the group and the cosines.

    Under ZeRO-3 a layer's experts are gathered while it is looked at; where AutoEP has spread experts over ranks, so
    are the chunks. All ranks must call it.
    """
    if group != MOE:
        answers = []
        layers: Any = [layer for layer in model.modules() if hasattr(layer, "expert_cosines")]
        for layer in layers:
            with _whole([weight for name, weight in layer.named_parameters() if ".mole_" in name]):
                answers.append(layer.expert_cosines())
        return [cosines for name, cosines in filter(None, answers) if name == group]
    found = []
    for block in moe_blocks(model):
        spread = getattr(block, "_is_autoep_layer", False)
        with _whole(block.experts.parameters()):
            found.append(weight_cosines(_stacks(block.experts, spread), _over_ranks(block) if spread else None))
    return found


def _stacks(experts: Any, spread: bool) -> list[Tensor]:
    """Return the stacks that make up the experts, with what adapters add to them."""
    added: dict[str, Tensor] = {}
    while hasattr(experts, "base_layer"):  # PEFT's wrapper of one stack, around that of another
        added[experts.parameter_name] = experts.get_delta_weight(experts.active_adapters[0]).detach()
        experts = experts.base_layer
    names = ("w1", "w3", "w2") if spread else (getattr(experts, "up_name", ""), "down_proj")
    return [
        weight + added[name] if name in added else weight
        for name in names
        if (weight := getattr(experts, name, None)) is not None
    ]


def moe_blocks(model: nn.Module) -> Iterator[Any]:
    """Yield the MoE layers of a model in order: ours, or what AutoEP put in their places."""
    for module in model.modules():
        if isinstance(module, SparseMoeBlock) or getattr(module, "_is_autoep_layer", False):
            yield module


def mean_cosine(cosines: Tensor) -> float:
    """Return the mean over pairs of different experts; 1: all are copies of one."""
    experts = cosines.shape[0]
    return float((cosines.sum() - cosines.diagonal().sum()) / (experts * (experts - 1)))


def _whole(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Gather parameters that ZeRO-3 keeps in shards."""
    shards = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shards:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(shards)


def _over_ranks(block: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what concatenates the experts of an AutoEP layer's ranks, in the order of their numbers."""
    if block.ep_size == 1:
        return None

    def gather(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(block.ep_size)]
        torch.distributed.all_gather(parts, part.contiguous(), group=block.ep_group)
        return torch.cat(parts)

    return gather
