"""`VisualTokens`: the one thing that travels between pixels and the language model.

Legend: N tokens of all items together, D feature width, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class MediaKind(StrEnum):
    """What a visual item is. Token counts may depend on it."""

    IMAGE = "image"
    VIDEO = "video"
    MULTI_VIEW = "multi_view"
    SLICE = "slice"


MEDIA_KINDS: tuple[MediaKind, ...] = tuple(MediaKind)
"""Order in which kinds are written to integer tensors (`media_kinds`)."""


class Grid(NamedTuple):
    """Tokens of one item laid out as time x height x width, in raster order (t slowest)."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the grid."""
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


@dataclass(frozen=True)
class VisualTokens:
    """Packed features of all visual items of a batch.

    Attributes:
        features: ``(N, D)``; the items one after the other, each in raster order of its grid.
        grids: One grid an item; their token counts sum to ``N``.
        kinds: Media kind of each item.
        owners: Index of the sample (document) that each item belongs to. Blocks that look at text or at neighbours
            must never mix items of different owners.
    """

    features: Tensor
    grids: tuple[Grid, ...]
    kinds: tuple[MediaKind, ...]
    owners: tuple[int, ...]

    def __post_init__(self) -> None:
        total = sum(grid.num_tokens for grid in self.grids)
        if self.features.ndim != 2 or self.features.shape[0] != total:
            raise ValueError(
                f"VisualTokens: features {tuple(self.features.shape)} do not hold the {total} tokens of grids "
                f"{[str(grid) for grid in self.grids]}"
            )
        if not len(self.grids) == len(self.kinds) == len(self.owners):
            raise ValueError(
                f"VisualTokens: {len(self.grids)} grids, {len(self.kinds)} kinds and {len(self.owners)} owners; "
                "there must be one of each an item"
            )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.grids)

    @property
    def dim(self) -> int:
        """Feature width D."""
        return self.features.shape[1]

    @property
    def lengths(self) -> list[int]:
        """Token count of each item."""
        return [grid.num_tokens for grid in self.grids]

    @property
    def offsets(self) -> list[int]:
        """Start of each item in `features`, and the end of the last: ``I + 1`` numbers."""
        return list(accumulate(self.lengths, initial=0))

    def split(self) -> tuple[Tensor, ...]:
        """Return the features of each item, ``(n_i, D)``; views, no copies."""
        return self.features.split(self.lengths)

    def with_features(self, features: Tensor, grids: Sequence[Grid] | None = None) -> VisualTokens:
        """Return the same items with new features and, where the layout changed, new grids."""
        return replace(self, features=features, grids=self.grids if grids is None else tuple(grids))
