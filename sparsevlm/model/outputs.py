"""What the models return.

Legend: B rows, T tokens a row, H language width, V vocabulary, N visual tokens, S = B * T routed tokens, E experts,
k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from sparsevlm.moe.router import Routing


def routing_columns(collected: Sequence[Routing]) -> dict[str, Any]:
    """Return what the routers did as fields of an output."""
    return {
        "router_logits": tuple(routing.logits for routing in collected),
        "router_indices": tuple(routing.index for routing in collected),
        "router_choices": tuple(routing.chosen for routing in collected),
        "router_groups": tuple(routing.group for routing in collected),
    }


@dataclass
class SparseVLMModelOutput(ModelOutput):
    """Output of the headless model.

    Attributes:
        last_hidden_state: ``(B, T, H)``.
        past_key_values: Cache, when asked for.
        hidden_states: Per layer, when asked for.
        attentions: Per layer, when asked for.
        image_hidden_states: ``(N, H)`` features written over the placeholders.
        router_logits: One ``(S, E)`` float32 tensor a router (of a MoE layer, or of LoRA experts, whose E may be
            another), in layer order, when asked for.
        router_indices: Beside them, ``(S, k)`` experts that took each token; -1 where dropped or padding.
        router_choices: Beside them, ``(S, k)`` experts that each token asked for; -1 for padding.
        router_groups: Beside them, the group of each router (`sparsevlm.moe.groups`).
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_indices: tuple[Tensor, ...] | None = None
    router_choices: tuple[Tensor, ...] | None = None
    router_groups: tuple[str, ...] | None = None


@dataclass
class SparseVLMCausalLMOutput(ModelOutput):
    """Output of the model with its head.

    Attributes:
        loss: Next-token loss plus the weighted auxiliary losses.
        aux_loss: Load-balancing loss alone, not weighted; the sum where there are several groups of routers.
        z_loss: Router z-loss alone, likewise.
        logits: ``(B, T, V)``; None in training, where only target positions are projected.
        past_key_values: Cache, when asked for.
        hidden_states: Per layer, when asked for.
        attentions: Per layer, when asked for.
        image_hidden_states: ``(N, H)`` features written over the placeholders.
        router_logits: One ``(S, E)`` float32 tensor a router (of a MoE layer, or of LoRA experts, whose E may be
            another), in layer order, when asked for.
        router_indices: Beside them, ``(S, k)`` experts that took each token; -1 where dropped or padding.
        router_groups: Beside them, the group of each router (`sparsevlm.moe.groups`).
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_indices: tuple[Tensor, ...] | None = None
    router_groups: tuple[str, ...] | None = None
