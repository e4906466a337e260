"""Order of the tokens of a medium: slices joined to one grid, learned tokens at the ends of rows, slices and media."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind, Place, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Join(NamedTuple):
    """How the slices of a picture become one grid.

    Attributes:
        whole: ``(h, w)`` of all slices side by side.
        crop: ``(top, bottom, left, right)`` of what shows the picture and no padding.
        resized: ``(h, w)`` that this is interpolated to; its own size where nothing is to be done.
    """

    whole: tuple[int, int]
    crop: tuple[int, int, int, int]
    resized: tuple[int, int]


@CONNECTOR_BLOCKS.register("layout")
class LayoutSpec(BlockSpec):
    """Joins the slices of a picture and adds learned tokens that say where rows, slices, frames and media end.

    The defaults are LLaVA-NeXT's (`spatial_unpad`): the slices of a picture become one grid, what shows padding is cut
    off, and a learned token ends each row; the overview stays as it is. Learned tokens are as wide as the features that
    come in, so the block belongs behind the projector. Without slices and row ends it leaves items as they are, and
    `start`, `end` and the others add tokens to them.
    """

    type: Literal["layout"] = "layout"
    """Registered name of the block."""
    join: bool = True
    """Put the slices of a picture together into one grid of tokens."""
    unpad: bool = True
    """Cut off the rows and columns of the joined grid that lie outside the picture; for tilings that keep the aspect
    ratio."""
    max_squares: float | None = Field(default=None, ge=1)
    """Joined grids that hold more tokens than so many slices (more than 1.1 times their side) are brought down to that
    by bilinear interpolation (9 in LLaVA-OneVision)."""
    row_end: Literal["none", "joined", "all"] = "joined"
    """A learned token at the end of each row: of the joined grid, where a picture that has no slices gets a single one
    at its end (`joined`), or of every frame of every item (`all`)."""
    slice_end: bool = False
    """A learned token after each slice that is not joined, the last of a row excepted."""
    slice_row_end: bool = False
    """A learned token after the last slice of each row that is not joined."""
    frame_end: bool = False
    """A learned token after each frame of a video or view of a scene, and after the overview of a picture that has
    other items (Oryx's separator)."""
    start: bool = False
    """A learned token before each medium."""
    end: bool = False
    """A learned token after each medium."""

    @property
    def parameter_free(self) -> bool:  # type: ignore[override]
        """Whether no learned token is added."""
        return not self.learned

    @property
    def marks(self) -> tuple[bool, bool]:
        """As the options say."""
        return self.start, self.end

    @property
    def learned(self) -> list[str]:
        """Names of the learned tokens."""
        flags = [name for name in ("slice_end", "slice_row_end", "frame_end", "start", "end") if getattr(self, name)]
        return [*(["row_end"] if self.row_end != "none" else []), *flags]

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return what becomes of an item that is a medium by itself, tokens before and after it left out."""
        [shape] = [shape for shape in self._items([ItemShape(grid, kind)]) if shape.place is not _ADDED]
        return shape.grid

    def output_items(self, items: Sequence[ItemShape]) -> list[ItemShape]:
        """Return the items after the block.

        Raises:
            ValueError: The slices of a picture are not all there, or have different grids or several frames.
        """
        shapes = []
        for _, medium in groupby(items, key=lambda item: item.medium):
            shapes += self._items(list(medium))
        return [shape._replace(place=None) if shape.place is _ADDED else shape for shape in shapes]

    def _items(self, items: list[ItemShape]) -> list[ItemShape]:
        """Return the items of one medium; those that are a learned token have the place `_ADDED`."""
        one = ItemShape(Grid(1, 1, 1), items[0].kind, items[0].medium, _ADDED)
        shapes = [one] if self.start else []
        slices = [item for item in items if is_slice(item)]
        joined = self.join and bool(slices)
        for item in items:
            if not (joined and is_slice(item)):
                shapes.append(item._replace(grid=self._ended(item.grid, item.kind, alone=len(items) == 1)))
                shapes += [one] * bool(self.separator(item, alone=len(items) == 1))
            elif item is slices[0]:
                h, w = self.joining(slices).resized
                grid = Grid(1, h, w + (self.row_end != "none"))
                place = item.place and item.place._replace(row=0, col=0, rows=1, cols=1)
                shapes.append(item._replace(grid=grid, place=place))
        return [*shapes, one] if self.end else shapes

    def _ended(self, grid: Grid, kind: MediaKind, alone: bool) -> Grid:
        """Return the grid of an item with the ends of its rows and frames."""
        t, h, w = grid
        if self.row_end == "all":
            w += 1
        elif self.row_end == "joined" and alone and kind is MediaKind.IMAGE:
            h, w = 1, h * w + 1
        if self.frame_end and is_film(kind):
            h, w = 1, h * w + 1
        return Grid(t, h, w)

    def separator(self, item: ItemShape, alone: bool) -> str | None:
        """Return the learned token that follows an overview, or a slice which is not joined."""
        if item.place is None or alone:
            return None
        if item.place.is_overview:
            name = "frame_end"
        elif item.kind is MediaKind.SLICE:
            name = "slice_row_end" if item.place.col == item.place.cols - 1 else "slice_end"
        else:
            return None
        return name if getattr(self, name) else None

    def joining(self, slices: Sequence[ItemShape]) -> Join:
        """Return how the slices of a picture become one grid.

        The part without padding is LLaVA-NeXT's `unpad_image`, in whole numbers; *Deviation*: of a picture so thin that
        no row (column) would be left, one or two are.

        Raises:
            ValueError: As `output_items`.
        """
        first = slices[0]
        assert first.place is not None, "a slice without a place"
        _, _, rows, cols, height, width = first.place
        t, h, w = first.grid
        found = [item.place[:2] for item in slices if item.place]
        if {item.grid for item in slices} != {Grid(1, h, w)}:
            grids = ", ".join(sorted({str(item.grid) for item in slices}))
            raise ValueError(f"layout: slices of grids {grids} cannot be joined; they must have one grid of one frame")
        if found != [(row, col) for row in range(rows) for col in range(cols)]:
            raise ValueError(f"layout: {len(slices)} slices of grid {t}x{h}x{w} do not fill {rows} rows of {cols}")
        top, bottom, left, right = 0, rows * h, 0, cols * w
        if self.unpad and width * bottom > right * height:  # wider than the grid: padded above and below
            top = (bottom - max(1, height * right // width)) // 2
            bottom -= top
        elif self.unpad:
            left = (right - max(1, width * bottom // height)) // 2
            right -= left
        kept = bottom - top, right - left
        return Join((rows * h, cols * w), (top, bottom, left, right), self._capped(kept, h * w))

    def _capped(self, size: tuple[int, int], square: int) -> tuple[int, int]:
        """Return the ``(h, w)`` that a joined grid is brought down to; ``square`` is the tokens of a slice."""
        if self.max_squares is None:
            return size
        times = math.sqrt(size[0] * size[1] / (self.max_squares * square))
        return (max(1, int(size[0] // times)), max(1, int(size[1] // times))) if times > 1.1 else size

    def build(self, input_dim: int, text_dim: int) -> LayoutBlock:
        """Return the module."""
        return LayoutBlock(self, input_dim)


_ADDED = Place(-2, -2, -2, -2, -2, -2)
"""Marks items that are a learned token while a medium is laid out."""


def is_slice(item: ItemShape) -> bool:
    """Whether an item is a slice with a known place in its picture."""
    return item.kind is MediaKind.SLICE and item.place is not None


def is_film(kind: MediaKind) -> bool:
    """Whether items of a kind consist of frames."""
    return kind not in (MediaKind.IMAGE, MediaKind.SLICE)


class LayoutBlock(nn.Module):
    """Learned tokens, each ``(D,)``, normal with standard deviation 1 / sqrt(D) as in LLaVA-NeXT."""

    def __init__(self, spec: LayoutSpec, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.learned = nn.ParameterDict({name: nn.Parameter(torch.randn(dim) / dim**0.5) for name in spec.learned})

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Lay out the tokens of each medium."""
        shapes = self.spec.output_items(tokens.shapes)
        parts: list[Tensor] = []
        items = list(zip(tokens.shapes, tokens.split(), strict=True))
        for _, medium in groupby(items, key=lambda item: item[0].medium):
            parts += self._medium(list(medium))
        features = torch.cat(parts) if parts else tokens.features
        for token in self.learned.values():  # ranks whose media do not use it take part in its gradient all the same
            features = features + 0 * token.sum().to(features.dtype)
        return tokens.with_items(features, shapes)

    def _medium(self, items: list[tuple[ItemShape, Tensor]]) -> list[Tensor]:
        """Return the features of a medium's items after the block, in order."""
        spec = self.spec
        slices = [(shape, features) for shape, features in items if spec.join and is_slice(shape)]
        parts = [self._token("start", items[0][1])] if spec.start else []
        for shape, features in items:
            if not (slices and is_slice(shape)):
                parts.append(self._ended(shape, features, alone=len(items) == 1))
                name = spec.separator(shape, alone=len(items) == 1)
                parts += [self._token(name, features)] if name else []
            elif shape is slices[0][0]:
                parts.append(self._joined(slices))
        return [*parts, self._token("end", items[0][1])] if spec.end else parts

    def _token(self, name: str, like: Tensor) -> Tensor:
        return self.learned[name].to(like.dtype)[None]  # (1, D)

    def _append(self, name: str, rows: Tensor) -> Tensor:
        """Append a learned token to each row, ``(..., n, D) -> (..., n + 1, D)``."""
        token = self.learned[name].to(rows.dtype).expand(*rows.shape[:-2], 1, -1)
        return torch.cat([rows, token], dim=-2)

    def _ended(self, shape: ItemShape, features: Tensor, alone: bool) -> Tensor:
        frames = features.view(*shape.grid, -1)  # (t, h, w, D)
        if self.spec.row_end == "all":
            frames = self._append("row_end", frames)
        elif self.spec.row_end == "joined" and alone and shape.kind is MediaKind.IMAGE:
            frames = self._append("row_end", frames.flatten(1, 2))
        if self.spec.frame_end and is_film(shape.kind):
            frames = self._append("frame_end", frames.reshape(shape.grid.t, -1, features.shape[1]))
        return frames.reshape(-1, features.shape[1])

    def _joined(self, slices: list[tuple[ItemShape, Tensor]]) -> Tensor:
        place, grid = slices[0][0].place, slices[0][0].grid
        assert place is not None
        join = self.spec.joining([shape for shape, _ in slices])
        stacked = torch.stack([features for _, features in slices])  # (rows * cols, h * w, D)
        stacked = stacked.view(place.rows, place.cols, grid.h, grid.w, -1).transpose(1, 2)  # (rows, h, cols, w, D)
        top, bottom, left, right = join.crop
        picture = stacked.reshape(*join.whole, -1)[top:bottom, left:right]  # (h', w', D)
        if join.resized != picture.shape[:2]:
            channels = picture.permute(2, 0, 1)[None]  # (1, D, h', w')
            channels = nn.functional.interpolate(channels, join.resized, mode="bilinear", align_corners=False)
            picture = channels[0].permute(1, 2, 0)
        if self.spec.row_end != "none":
            picture = self._append("row_end", picture)
        return picture.reshape(-1, picture.shape[-1])
