"""Oryx's dynamic compressor: fewer tokens the longer the medium, each asking the region that it stands for.

Legend: F frames of h x w tokens, D width, r side of a region in tokens, R regions of all frames, C inner width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens


@CONNECTOR_BLOCKS.register("dynamic_compressor")
class DynamicCompressorSpec(BlockSpec):
    """Regional attention at a ratio by kind of media (Oryx, Liu et al., arXiv:2409.12961, section 3.2).

    Of each r x r region the mean p attends to the region's tokens g: ``p + softmax((W_q p) (W_k g)^T / sqrt(C)) g``.
    The two projections are all that it has: values are the features themselves. One shared projector follows, for all
    kinds: ``{type: mlp}``.

    With a ratio of 1 a region is one token, so softmax is 1 and **each token comes out doubled**; the projections get
    no gradient from it. That is what Oryx computes and what its checkpoints expect, so it is kept;
    `double: false` passes such tokens through as they are.

    *Deviations*: scores that are not a number stay so; Oryx puts 0 in their place.
    """

    type: Literal["dynamic_compressor"] = "dynamic_compressor"
    """Registered name of the block."""
    image: int = Field(default=1, ge=1)
    """r for images and slices: 1 is no compression."""
    video: int = Field(default=2, ge=1)
    """r for videos and views of scenes: 2 leaves a quarter of the tokens."""
    long_video: int = Field(default=4, ge=1)
    """r for long videos: 4 leaves a sixteenth."""
    dim: int = Field(default=256, ge=1)
    """C: width of the projections."""
    double: bool = True
    """What r = 1 does: double each token (Oryx), or leave it as it is."""

    def ratio(self, kind: MediaKind) -> int:
        """Return r for a kind of media."""
        if kind in (MediaKind.IMAGE, MediaKind.SLICE):
            return self.image
        return self.long_video if kind is MediaKind.LONG_VIDEO else self.video

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, h / r, w / r)``.

        Raises:
            ValueError: A side does not divide by r.
        """
        ratio = self.ratio(kind)
        if grid.h % ratio or grid.w % ratio:
            raise ValueError(
                f"dynamic_compressor: a grid of {grid.h} x {grid.w} tokens ({kind}) does not divide into regions of "
                f"{ratio} x {ratio}; choose another ratio, or a model.vision.image_size whose grid divides"
            )
        return Grid(grid.t, grid.h // ratio, grid.w // ratio)

    def build(self, input_dim: int, text_dim: int) -> DynamicCompressorBlock:
        """Return the module."""
        return DynamicCompressorBlock(self, input_dim)


class DynamicCompressorBlock(nn.Module):
    """The two projections and the attention within regions."""

    def __init__(self, spec: DynamicCompressorSpec, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.query = nn.Linear(dim, spec.dim)
        self.key = nn.Linear(dim, spec.dim)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Compress each item."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        ratios = [self.spec.ratio(kind) for kind in tokens.kinds]
        items = tokens.split()
        regions = [_regions(*each) for each in zip(items, tokens.grids, ratios)]  # (R_i, r * r, D) each
        asking = [region for region, ratio in zip(regions, ratios) if ratio > 1]
        means = [region.mean(dim=1) for region in asking]
        # Each projection runs once whatever the media are: ranks of a sharded run gather its weights together.
        none = tokens.features[:0]
        query = self.query(torch.cat([none, *means]))
        key = self.key(torch.cat([none, *(region.flatten(0, 1) for region in asking)]))
        queries = query.split([len(mean) for mean in means])
        keys = key.split([region.shape[0] * region.shape[1] for region in asking])
        attended = (self._attend(*each) for each in zip(asking, means, queries, keys))
        outputs = [
            next(attended) if ratio > 1 else item * (2 if self.spec.double else 1) for item, ratio in zip(items, ratios)
        ]
        touched = query[:0].sum() + key[:0].sum()  # 0: pictures alone give the projections a gradient too, of 0
        return tokens.with_features(torch.cat([none, *outputs]) + touched, grids)

    def _attend(self, regions: Tensor, means: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Return one token a region, ``(R, D)``."""
        keys = keys.view(*regions.shape[:2], -1)  # (R, r * r, C)
        scores = queries[:, None] @ keys.transpose(1, 2) / self.spec.dim**0.5  # (R, 1, r * r)
        return means + (scores.softmax(dim=-1) @ regions)[:, 0]


def _regions(features: Tensor, grid: Grid, ratio: int) -> Tensor:
    """Return the r x r regions of an item, row by row, each in raster order: ``(R, r * r, D)``."""
    frames = features.view(grid.t, grid.h // ratio, ratio, grid.w // ratio, ratio, -1)
    return frames.transpose(2, 3).flatten(3, 4).flatten(0, 2)
