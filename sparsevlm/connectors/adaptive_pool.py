"""Average pooling of each frame to a fixed grid."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from sparsevlm.connectors.base import BlockSpec, map_frames
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

Side = Annotated[int, Field(ge=1)]


@CONNECTOR_BLOCKS.register("adaptive_pool")
class AdaptivePoolSpec(BlockSpec):
    """Averages the tokens of each frame over an even partition of its grid (DeCo).

    Cell ``i`` of ``k`` over ``n`` rows covers rows ``floor(i * n / k)`` to ``ceil((i + 1) * n / k) - 1``, so cells
    overlap by a row where k does not divide n (torch's `adaptive_avg_pool2d`). A side that is already as short is left
    as it is: pooling never adds tokens.
    """

    type: Literal["adaptive_pool"] = "adaptive_pool"
    """Registered name of the block."""
    size: Side | tuple[Side, Side] = 12
    """Largest grid to leave, a side or (height, width), in tokens."""

    parameter_free = True

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, min(h, height), min(w, width))``."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return Grid(grid.t, min(grid.h, height), min(grid.w, width))

    def build(self, input_dim: int, text_dim: int) -> AdaptivePoolBlock:
        """Return the module."""
        return AdaptivePoolBlock(self)


class AdaptivePoolBlock(nn.Module):
    """Average pooling in space; time is left alone."""

    def __init__(self, spec: AdaptivePoolSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Pool every frame."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        return tokens.with_features(map_frames(tokens, tokens.dim, self._pool), grids)

    def _pool(self, frames: Tensor) -> Tensor:
        _, h, w = self.spec.output_grid(Grid(1, *frames.shape[1:3]), MediaKind.IMAGE)
        pooled = functional.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2), (h, w))  # (F, D, h', w')
        return pooled.permute(0, 2, 3, 1)  # (F, h', w', D)
