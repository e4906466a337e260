"""Flamingo's block: text attends to media that stay beside it, behind gates that are closed at the start.

Legend: B rows, T tokens a row, N visual tokens of all media, K visual tokens of a row, H language width, D width of the
visual tokens, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from sparsevlm.fusion.media import SeenMedia, seen_media
from sparsevlm.surgery import FUSION_MODULES

NAME = FUSION_MODULES[0]
"""Name of the block in its decoder layer."""


class CrossAttention(nn.Module):
    """Attention from text to media, without biases; only the text is normed here (a resampler norms its output)."""

    def __init__(self, dim: int, media_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(media_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def project(self, states: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of each row, ``(B, h, K, d)`` both.

        Args:
            states: ``(N, D)``.
            keys: ``(B, K)`` index into `states`.
        """
        both = self.to_kv(states)[keys]  # (B, K, 2 h d)
        key, value = both.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attend; a token that sees nothing gets 0.

        Args:
            x: ``(B, T, H)``.
            key: ``(B, h, K, d)``.
            value: As `key`.
            visible: ``(B, T, K)`` bool.
        """
        query = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, T, d)
        sees = visible.any(-1, keepdim=True)  # (B, T, 1)
        # A softmax over nothing is no number: such tokens look everywhere, and what they find is dropped.
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=(visible | ~sees)[:, None])
        found = found.transpose(1, 2).flatten(2).masked_fill(~sees, 0.0)  # (B, T, h d)
        return self.to_out(found)


class GatedCrossAttention(nn.Module):
    """``x + tanh(a) XAttn(x, media)``, then ``x + tanh(b) FF(x)``; a = b = 0 at the start.

    Source: Alayrac et al. 2022 (Flamingo, arXiv:2204.14198), section 2.2; sizes and names as in OpenFlamingo
    (`open_flamingo/src/helpers.py`). *Deviations*: in a packed row, no token sees media of another document.

    Args:
        dim: H.
        media_dim: D.
        index: Decoder layer that the block stands before.
        heads: h.
        head_dim: d.
        ff_mult: Width of the FFN, as a multiple of H.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(
        self, dim: int, media_dim: int, index: int, heads: int = 8, head_dim: int = 64, ff_mult: int = 4
    ) -> None:
        super().__init__()
        self.index = index
        self.attn = CrossAttention(dim, media_dim, heads, head_dim)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, ff_mult * dim, bias=False),
            nn.GELU(),
            nn.Linear(ff_mult * dim, dim, bias=False),
        )
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def initialize_parameters(self) -> None:
        """Set the gates, unless they already hold values; all else is of kinds that transformers draws."""
        init.zeros_(self.attn_gate)
        init.zeros_(self.ff_gate)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, H)`` to ``(B, T, H)``; the media are those of the forward pass that runs."""
        seen = seen_media()
        if seen is None or seen.states is None:  # text alone
            return x + self.ff_gate.tanh() * self.ff(x)
        if seen.first.shape != x.shape[:2]:
            raise ValueError(
                f"fusion: layer {self.index} runs on {tuple(x.shape[:2])} tokens, but the media were given for "
                f"{tuple(seen.first.shape)}"
            )
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(
                self._with_states, x, seen.states, seen.keys, seen.visible(x.device)
            )
        return self._with_media(x, *self._projected(seen), seen.visible(x.device))

    def _projected(self, seen: SeenMedia) -> tuple[Tensor, Tensor]:
        """Return the rows' keys and values, from the cache where it has them."""
        assert seen.states is not None
        if torch.is_grad_enabled():
            return self.attn.project(seen.states, seen.keys)
        if self.index not in seen.projected:
            seen.projected[self.index] = self.attn.project(seen.states, seen.keys)
        return seen.projected[self.index]

    def _with_states(self, x: Tensor, states: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        return self._with_media(x, *self.attn.project(states, keys), visible)

    def _with_media(self, x: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn_gate.tanh() * self.attn(x, key, value, visible)
        return x + self.ff_gate.tanh() * self.ff(x)
