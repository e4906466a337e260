"""Linear projector: one matrix (LLaVA v1, Chat-UniVi, MiniGPT-4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import VisualTokens


@CONNECTOR_BLOCKS.register("linear")
class LinearSpec(BlockSpec):
    """One linear layer, token by token."""

    type: Literal["linear"] = "linear"
    """Registered name of the block."""
    dim: int | None = Field(default=None, ge=1)
    """Width of the output; default: the language model's."""
    bias: bool = True
    """Add a bias."""

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return `dim`, or the language model's width."""
        return text_dim if self.dim is None else self.dim

    def build(self, input_dim: int, text_dim: int) -> LinearBlock:
        """Return the module."""
        return LinearBlock(input_dim, self.output_dim(input_dim, text_dim), self.bias)


class LinearBlock(nn.Module):
    """``y = W x + b``; initialised as torch does (uniform, 1/sqrt(input width)), as the published projectors are."""

    def __init__(self, input_dim: int, output_dim: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim, bias=bias)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Project every token."""
        return tokens.with_features(self.linear(tokens.features))  # (N, D) -> (N, D')
