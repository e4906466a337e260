"""Whether a language model that is taken in computes in our model what it does in its own class."""

from __future__ import annotations

from typing import Any

import torch

from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig

PARITY_TOLERANCE = 1e-4
"""Largest logit difference, relative to the largest logit, between the source language model and ours (float32)."""


def some_tokens(config: SparseVLMConfig) -> torch.Tensor:
    """Return up to eight tokens of text, ``(1, T)``."""
    ids = torch.arange(7, 7 + 11 * 8, 11).remainder(config.text_config.vocab_size)
    return ids[(ids != config.image_token_id) & (ids != config.video_token_id)][None]


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits in float32."""
    return model(input_ids=ids).logits.float()


def check_parity(want: torch.Tensor, got: torch.Tensor, source: str) -> None:
    """Refuse a language model whose own wrapper does more than decoder + head (scaled or capped logits).

    Args:
        want: Logits of the language model as it came.
        got: Ours.
        source: Its path and class, for the message.
    """
    difference = float((want - got).abs().max() / want.abs().max().clamp(min=1))
    if difference > PARITY_TOLERANCE:
        raise ValueError(
            f"language model {source} computes logits that decoder + lm_head do not give (relative difference "
            f"{difference:.2e}, allowed {PARITY_TOLERANCE}); it probably scales or caps them, which is not supported"
        )
