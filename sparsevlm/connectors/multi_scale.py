"""A picture at two scales: the features of its slices, brought to the overview's grid, beside the overview's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.connectors.layout import is_slice
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


@CONNECTOR_BLOCKS.register("multi_scale")
class MultiScaleSpec(BlockSpec):
    """Joins the slices of a picture to one large grid, averages that down to the overview's grid, and concatenates the
    two along the features: twice the width, as many tokens as one view has.

    For tilings whose slices together show what the overview shows (`{type: monkey}` with 2 x 2 slices is S2's second
    scale); before the projector. What has no slices (frames of videos, views of scenes) stands beside itself.

    Source: Shi et al. 2024 (S2, arXiv:2403.13043), section 3.1. *Deviations*: slices are cut from the picture resized
    once to their size, not from the smaller scale's input; there are two scales.
    """

    type: Literal["multi_scale"] = "multi_scale"
    """Registered name of the block."""

    parameter_free = True

    def output_items(self, items: Sequence[ItemShape]) -> list[ItemShape]:
        """Return one item for a picture with slices, all others as they are.

        Raises:
            ValueError: A picture has slices and no overview, or slices of different grids or in no order.
        """
        shapes = []
        for _, medium in groupby(items, key=lambda item: item.medium):
            each = list(medium)
            slices = [item for item in each if is_slice(item)]
            shapes += each if not slices else [_overview(each, slices)]
        return shapes

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return twice the width."""
        return 2 * input_dim

    def build(self, input_dim: int, text_dim: int) -> MultiScaleBlock:
        """Return the module."""
        return MultiScaleBlock(self)


def _overview(items: list[ItemShape], slices: list[ItemShape]) -> ItemShape:
    """Return what a picture becomes, after a look at whether its slices make one grid."""
    others = [item for item in items if not is_slice(item)]
    if len(others) != 1 or others[0].grid.t != 1:
        grids = ", ".join(str(item.grid) for item in items)
        raise ValueError(
            f"multi_scale: {len(slices)} slices need one overview of one frame beside them, got {len(others)} (grids "
            f"{grids}); use a tiling with an overview, and put the block first"
        )
    first = slices[0]
    assert first.place is not None, "a slice without a place"
    wanted = [(row, col) for row in range(first.place.rows) for col in range(first.place.cols)]
    one_grid = {item.grid for item in slices} == {Grid(1, first.grid.h, first.grid.w)}
    if not one_grid or [item.place[:2] for item in slices if item.place] != wanted:
        grids = ", ".join(sorted({str(item.grid) for item in slices}))
        raise ValueError(
            f"multi_scale: {len(slices)} slices of grids {grids} do not make {first.place.rows} rows of "
            f"{first.place.cols}; put the block before those that change grids"
        )
    return others[0]._replace(kind=MediaKind.IMAGE, place=None)


class MultiScaleBlock(nn.Module):
    """Average pooling and concatenation, ``(n, D) -> (n, 2 D)``."""

    def __init__(self, spec: MultiScaleSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Put the scales of each picture side by side."""
        shapes = self.spec.output_items(tokens.shapes)
        parts: list[Tensor] = []
        items = list(zip(tokens.shapes, tokens.split(), strict=True))
        for _, medium in groupby(items, key=lambda item: item[0].medium):
            each = list(medium)
            slices = [(shape, features) for shape, features in each if is_slice(shape)]
            for shape, features in each:
                if slices and is_slice(shape):
                    continue
                larger = _pooled(slices, shape.grid) if slices else features
                parts.append(torch.cat([features, larger], dim=-1))  # (n, 2 D)
        features = torch.cat(parts) if parts else tokens.features.new_zeros(0, 2 * tokens.dim)
        return tokens.with_items(features, shapes)


def _pooled(slices: list[tuple[ItemShape, Tensor]], grid: Grid) -> Tensor:
    """Average the joined grid of slices down (or spread it up) to a grid, ``(h * w, D)``."""
    shape = slices[0][0]
    assert shape.place is not None
    rows, cols, (_, h, w) = shape.place.rows, shape.place.cols, shape.grid
    stacked = torch.stack([features for _, features in slices])  # (rows * cols, h * w, D)
    joined = stacked.view(rows, cols, h, w, -1).transpose(1, 2).reshape(rows * h, cols * w, -1)
    pooled = nn.functional.adaptive_avg_pool2d(joined.permute(2, 0, 1), (grid.h, grid.w))  # (D, grid.h, grid.w)
    return pooled.flatten(1).T
