"""What the models return.

Legend: B rows, T tokens a row, H language width, V vocabulary, N visual tokens, S = B * T routed tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class SparseVLMModelOutput(ModelOutput):
    """Output of the headless model.

    Attributes:
        last_hidden_state: ``(B, T, H)``.
        past_key_values: Cache, when asked for.
        hidden_states: Per layer, when asked for.
        attentions: Per layer, when asked for.
        image_hidden_states: ``(N, H)`` features written over the placeholders.
        router_logits: One ``(S, E)`` float32 tensor a MoE layer, when asked for.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class SparseVLMCausalLMOutput(ModelOutput):
    """Output of the model with its head.

    Attributes:
        loss: Next-token loss plus the weighted load-balancing loss.
        aux_loss: Load-balancing loss alone, not weighted.
        logits: ``(B, T, V)``; None in training, where only target positions are projected.
        past_key_values: Cache, when asked for.
        hidden_states: Per layer, when asked for.
        attentions: Per layer, when asked for.
        image_hidden_states: ``(N, H)`` features written over the placeholders.
        router_logits: One ``(S, E)`` float32 tensor a MoE layer, when asked for.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
