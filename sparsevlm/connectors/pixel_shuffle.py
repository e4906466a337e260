"""Space to depth: every r x r square of tokens becomes one token r*r times as wide (InternVL, Idefics 3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from sparsevlm.connectors.base import BlockSpec, map_frames
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens


@CONNECTOR_BLOCKS.register("pixel_shuffle")
class PixelShuffleSpec(BlockSpec):
    """Puts the features of each r x r square of tokens side by side; follow it with a projector.

    The square's tokens stand in raster order: channel ``(dy * r + dx) * D + c`` of the new token is channel ``c`` of
    the token ``dy`` rows below and ``dx`` columns right of the square's corner. That is the order of Idefics 3.
    """

    type: Literal["pixel_shuffle"] = "pixel_shuffle"
    """Registered name of the block."""
    factor: int = Field(default=2, ge=1)
    """r: side of a square in tokens; height and width of the grid must divide by it."""

    parameter_free = True

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, h / r, w / r)``.

        Raises:
            ValueError: A side does not divide by r.
        """
        if grid.h % self.factor or grid.w % self.factor:
            raise ValueError(
                f"pixel_shuffle: a grid of {grid.h} x {grid.w} tokens does not divide into squares of {self.factor} x "
                f"{self.factor}; choose another factor, or a model.vision.image_size whose grid divides (at native "
                "resolution: a larger `multiple` of the sides)"
            )
        return Grid(grid.t, grid.h // self.factor, grid.w // self.factor)

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return r * r times the width."""
        return input_dim * self.factor**2

    def build(self, input_dim: int, text_dim: int) -> PixelShuffleBlock:
        """Return the module."""
        return PixelShuffleBlock(self)


class PixelShuffleBlock(nn.Module):
    """Space to depth; moves values, computes nothing."""

    def __init__(self, spec: PixelShuffleSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Merge each square."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        features = map_frames(tokens, self.spec.output_dim(tokens.dim, 0), self._merge)
        return tokens.with_features(features, grids)

    def _merge(self, frames: Tensor) -> Tensor:
        factor = self.spec.factor
        squares = frames.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # (F, h/r, r, w/r, r, D)
        return squares.transpose(2, 3).flatten(3)  # (F, h/r, w/r, r * r * D)
