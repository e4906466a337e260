"""Concatenation of neighbours in raster order (MiniGPT-v2, MiniGPT4-Video)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from sparsevlm.connectors.base import BlockSpec, map_frames
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens


@CONNECTOR_BLOCKS.register("concat")
class ConcatSpec(BlockSpec):
    """Makes one token, n times as wide, of every n consecutive tokens of a frame; follow it with a projector.

    Token j of a frame is the tokens n*j to n*j+n-1 side by side: with n = 4, a strip of 1 x 4 patches of a row, not a
    2 x 2 square (MiniGPT-v2: ``view(B, N / 4, 4 * D)``). Never across frames.
    """

    type: Literal["concat"] = "concat"
    """Registered name of the block."""
    number: int = Field(default=4, ge=1)
    """n: tokens that become one; the tokens of a frame must divide by it."""

    parameter_free = True

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, h, w / n)``, or ``(t, 1, h * w / n)`` where n tokens reach over the end of a row.

        Raises:
            ValueError: The tokens of a frame do not divide by n.
        """
        if grid.h * grid.w % self.number:
            raise ValueError(
                f"concat: the {grid.h} x {grid.w} = {grid.h * grid.w} tokens of a frame do not divide by "
                f"{self.number}; choose another number, or a model.vision.image_size whose token count divides"
            )
        if grid.w % self.number:
            return Grid(grid.t, 1, grid.h * grid.w // self.number)
        return Grid(grid.t, grid.h, grid.w // self.number)

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return n times the width."""
        return input_dim * self.number

    def build(self, input_dim: int, text_dim: int) -> ConcatBlock:
        """Return the module."""
        return ConcatBlock(self)


class ConcatBlock(nn.Module):
    """Reshape of each frame, ``(h * w, D) -> (h * w / n, n * D)``."""

    def __init__(self, spec: ConcatSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Concatenate neighbours."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        dim = self.spec.output_dim(tokens.dim, 0)
        features = map_frames(tokens, dim, lambda frames: frames.reshape(len(frames), -1, dim))
        return tokens.with_features(features, grids)
