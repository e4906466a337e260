"""Experts by modality: which tokens of a forward pass are visual, and the router that goes by it alone.

What is visual is a property of one forward pass, so it lives in a context variable for that long (see `recompute`).

Legend: B rows, T tokens a row, S = B * T, n visual tokens, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.moe.router import record_routing
from sparsevlm.recompute import carried, carry_to_recomputation, setting

SCORING = "modality"
"""Name of this routing in recipes and configs."""

TEXT, VISUAL = 0, 1
"""Experts that text and visual tokens go to."""


@dataclass(frozen=True)
class Modalities:
    """The visual tokens of a forward pass and the others.

    Attributes:
        mask: ``(S,)`` bool, True where visual.
        visual: ``(n,)`` positions of the visual tokens, in reading order.
        text: ``(S - n,)`` positions of the others.
    """

    mask: Tensor
    visual: Tensor
    text: Tensor


_MODALITIES: ContextVar[Modalities | None] = carried("sparsevlm_modalities")


@contextmanager
def telling_apart(language_model: nn.Module, visual: Tensor) -> Iterator[None]:
    """Tell the layers that run inside, and their recomputations, which tokens are visual.

    Args:
        language_model: The decoder that is called inside.
        visual: ``(B, T)`` bool.

    Raises:
        ValueError: The decoder's recomputations cannot be told.
    """
    flat = visual.reshape(-1)
    found = Modalities(flat, flat.nonzero().squeeze(-1), (~flat).nonzero().squeeze(-1))
    if language_model.training and torch.is_grad_enabled():
        carry_to_recomputation(language_model, "which tokens are visual", "train without experts by modality")
    with setting(_MODALITIES, found):
        yield


def modalities(num_tokens: int) -> Modalities:
    """Return the visual tokens of the forward pass that runs.

    Args:
        num_tokens: S, as the caller sees it.

    Raises:
        ValueError: Unknown, or those of other tokens.
    """
    found = _MODALITIES.get()
    if found is None:
        raise ValueError(
            "which tokens are visual is unknown: experts by modality run outside a forward pass of their model. Call "
            "the model, not its layers, with input_ids; and checkpoint layers with "
            "model.gradient_checkpointing_enable(), since what wraps them from outside recomputes them without it"
        )
    if found.mask.numel() != num_tokens:
        raise ValueError(
            f"experts by modality run on {num_tokens} tokens, but the visual ones were told among "
            f"{found.mask.numel()}; leave this layer as it is"
        )
    return found


def goes_by_modality(moe: Mapping[str, Any] | None) -> bool:
    """Tell of a model config's `moe` field whether its experts are chosen by modality."""
    return moe is not None and moe.get("scoring_func") == SCORING


class ModalityRouter(nn.Module):
    """Sends text tokens to one expert and visual tokens to the other, each with weight 1; nothing is learned.

    Takes the place of a `TopKRouter` of two experts and k = 1. It has no logits: records hold zeros.

    Source: the visual expert's FFN (CogVLM, arXiv:2311.03079, section 2.1) as hard-routed experts, as in VLMo
    (arXiv:2111.02358).
    """

    num_experts = 2
    top_k = 1

    def initialize_parameters(self) -> None:
        """Draw nothing."""

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_states: ``(S, H)``.
            token_mask: ``(S,)`` bool, False for padding; None: all are real.

        Returns:
            Zeros ``(S, 2)``, weights ``(S, 1)``, both float32, and expert indices ``(S, 1)``. Padding has weight 0.

        Raises:
            ValueError: See `modalities`.
        """
        mask = modalities(hidden_states.shape[0]).mask.to(hidden_states.device)
        index = torch.where(mask, VISUAL, TEXT)[:, None]  # (S, 1)
        real = torch.ones_like(mask) if token_mask is None else token_mask
        logits = torch.zeros(len(mask), self.num_experts, device=index.device)
        record_routing(logits, index.masked_fill(~real[:, None], -1))
        return logits, real[:, None].float(), index
