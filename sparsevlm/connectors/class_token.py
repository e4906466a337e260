"""The class token of each frame, from one layer of the tower or from several (LaVIN)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from sparsevlm.connectors.base import BlockSpec, map_frames
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens


@CONNECTOR_BLOCKS.register("class_token")
class ClassTokenSpec(BlockSpec):
    """Keeps the first token of each frame, the class token, and makes one token of each layer that it was taken from.

    For towers with a class token and `model.vision.select: full`; the first block. With `layer: [4, 8, 12, 16, 20, 24]`
    features are six layers wide and `levels: 6` gives six tokens, lowest layer first (LaVIN).
    """

    type: Literal["class_token"] = "class_token"
    """Registered name of the block."""
    levels: int = Field(default=1, ge=1)
    """Layers whose features are side by side: as many as `model.vision.layer` lists."""

    parameter_free = True

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, 1, levels)``.

        Raises:
            ValueError: A grid of patches, in which no token stands out.
        """
        if grid.h != 1:
            raise ValueError(
                f"class_token: a frame is a grid of {grid.h} x {grid.w} patches; put the block first, and set "
                "model.vision.select to full with a tower that has a class token"
            )
        return Grid(grid.t, 1, self.levels)

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return the width of one layer.

        Raises:
            ValueError: The width does not divide by the layers.
        """
        if input_dim % self.levels:
            raise ValueError(
                f"class_token: {self.levels} levels do not divide the width {input_dim}; levels is the number of "
                "layers that model.vision.layer lists"
            )
        return input_dim // self.levels

    def build(self, input_dim: int, text_dim: int) -> ClassTokenBlock:
        """Return the module."""
        self.output_dim(input_dim, text_dim)
        return ClassTokenBlock(self)


class ClassTokenBlock(nn.Module):
    """Selection and reshape of each frame, ``(n, levels * D) -> (levels, D)``."""

    def __init__(self, spec: ClassTokenSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Keep the class tokens."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        dim = self.spec.output_dim(tokens.dim, 0)
        return tokens.with_features(map_frames(tokens, dim, lambda frames: frames[:, 0, 0]), grids)
