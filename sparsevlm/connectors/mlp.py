"""MLP projector: LLaVA-1.5's mlp2x_gelu and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import nn

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import VisualTokens

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@CONNECTOR_BLOCKS.register("mlp")
class MlpSpec(BlockSpec):
    """Linear layers with an activation between them, token by token.

    The default, depth 2 with gelu, is LLaVA-1.5's `mlp2x_gelu`. Yi-VL's `mlp2x_gelu_Norm` is ``norm: post``, InternVL's
    projector ``norm: pre``.
    """

    type: Literal["mlp"] = "mlp"
    """Registered name of the block."""
    depth: int = Field(default=2, ge=1)
    """Linear layers."""
    dim: int | None = Field(default=None, ge=1)
    """Width of the output; default: the language model's."""
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width between the layers; default: that of the output."""
    activation: Activation = "gelu"
    """Activation between the layers."""
    norm: Literal["none", "pre", "post"] = "none"
    """Layer norm: `pre`, once, of the input; `post`, after every linear layer."""
    bias: bool = True
    """Give the linear layers biases."""

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return `dim`, or the language model's width."""
        return text_dim if self.dim is None else self.dim

    def build(self, input_dim: int, text_dim: int) -> MlpBlock:
        """Return the module."""
        output_dim = self.output_dim(input_dim, text_dim)
        return MlpBlock([input_dim, *[self.hidden_dim or output_dim] * (self.depth - 1), output_dim], self)


class MlpBlock(nn.Module):
    """Stack of linear layers, ``widths[0] -> widths[1] -> ...``; initialised as torch does.

    Without norms, `layers` holds the parameters under LLaVA's names: ``0``, ``2``, ...
    """

    def __init__(self, widths: list[int], spec: MlpSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(widths[0])] if spec.norm == "pre" else []
        for index, (before, after) in enumerate(pairwise(widths)):
            if index > 0:
                layers.append(_ACTIVATIONS[spec.activation]())
            layers.append(nn.Linear(before, after, bias=spec.bias))
            if spec.norm == "post":
                layers.append(nn.LayerNorm(after))
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Project every token."""
        return tokens.with_features(self.layers(tokens.features))  # (N, D) -> (N, D')
