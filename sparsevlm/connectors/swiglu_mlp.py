"""CogVLM's projector: a linear layer, a norm and a gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn
from torch.nn import functional as F

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.registry import CONNECTOR_BLOCKS

if TYPE_CHECKING:
    from sparsevlm.vision.tokens import VisualTokens


@CONNECTOR_BLOCKS.register("swiglu_mlp")
class SwigluMlpSpec(BlockSpec):
    """A linear layer, a layer norm and a GELU, then an MLP whose hidden units are gated (SwiGLU), token by token.

    CogVLM's adapter (Wang et al. 2023, arXiv:2311.03079, and its code): `hidden_dim` is there the width of the language
    model's FFN, 11008.
    """

    type: Literal["swiglu_mlp"] = "swiglu_mlp"
    """Registered name of the block."""
    hidden_dim: int = Field(ge=1)
    """Width inside the gated MLP."""
    dim: int | None = Field(default=None, ge=1)
    """Width before and after the gated MLP; default: the language model's."""
    bias: bool = False
    """Give the linear layers biases."""

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return `dim`, or the language model's width."""
        return text_dim if self.dim is None else self.dim

    def build(self, input_dim: int, text_dim: int) -> SwigluMlpBlock:
        """Return the module."""
        return SwigluMlpBlock(input_dim, self.hidden_dim, self.output_dim(input_dim, text_dim), self.bias)


class SwigluMlpBlock(nn.Module):
    """``u = GELU(LN(W x))``, then ``V (silu(G u) * U u)``; initialised as torch does, named as in CogVLM's code."""

    def __init__(self, input_dim: int, hidden_dim: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(input_dim, dim, bias=bias)
        self.norm1 = nn.LayerNorm(dim)
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.dense_h_to_4h = nn.Linear(dim, hidden_dim, bias=bias)
        self.dense_4h_to_h = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Project every token."""
        u = F.gelu(self.norm1(self.linear_proj(tokens.features)))  # (N, D')
        return tokens.with_features(self.dense_4h_to_h(F.silu(self.gate_proj(u)) * self.dense_h_to_4h(u)))
