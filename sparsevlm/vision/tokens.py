"""`VisualTokens`: the one thing that travels between pixels and the language model.

A *medium* is what one placeholder of a prompt stands for: a picture, a video, a list of views. It consists of one
*item* or, where a picture is cut, of several: the overview and its slices. Blocks see items; what a medium's items have
to do with each other is in their places.

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
    LONG_VIDEO = "long_video"
    """A video of so many frames that it is shown in fewer tokens a frame. Media are videos, their items may be this."""

    @property
    def is_video(self) -> bool:
        """Whether an item of this kind is frames in time."""
        return self in (MediaKind.VIDEO, MediaKind.LONG_VIDEO)


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


class Place(NamedTuple):
    """Where an item lies in its picture.

    Attributes:
        row: Row of the slice among the picture's slices; -1 for the overview.
        col: Column of the slice; -1 for the overview.
        rows: Rows of slices; 0 where the picture is not cut.
        cols: Columns of slices.
        height: Height in pixels of the picture as it was before it was brought to the slices' size.
        width: Its width.
    """

    row: int
    col: int
    rows: int
    cols: int
    height: int
    width: int

    @property
    def is_overview(self) -> bool:
        """Whether the item shows the whole picture beside its slices."""
        return self.row < 0


NO_PLACE = Place(-1, -1, -1, -1, -1, -1)
"""How `media_places` writes that an item has no place."""


class ItemShape(NamedTuple):
    """All that token counts may depend on: an item without its features.

    Attributes:
        grid: Its tokens.
        kind: Media kind.
        medium: Number of the medium that it belongs to; the items of a medium follow each other.
        place: Where it lies in its picture; None for items that are a medium by themselves.
    """

    grid: Grid
    kind: MediaKind
    medium: int = 0
    place: Place | None = None


@dataclass(frozen=True)
class Guides:
    """Texts that blocks may look at: the question that a medium is asked about.

    Attributes:
        input_ids: ``(G, L)`` token ids, right-padded.
        attention_mask: ``(G, L)``, 0 for padding.
        index: Guide of each item, ``I`` numbers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    index: tuple[int, ...]


@dataclass(frozen=True)
class VisualTokens:
    """Packed features of all visual items of a batch.

    Attributes:
        features: ``(N, D)``; the items one after the other, each in raster order of its grid.
        grids: One grid an item; their token counts sum to ``N``.
        kinds: Media kind of each item.
        owners: Index of the sample (document) that each item belongs to. Blocks that look at text or at neighbours
            must never mix items of different owners.
        media: Medium of each item, ascending; default: each item is one.
        places: Place of each item; default: none has one.
        guides: Texts for blocks that look at text, where there are such blocks.
    """

    features: Tensor
    grids: tuple[Grid, ...]
    kinds: tuple[MediaKind, ...]
    owners: tuple[int, ...]
    media: tuple[int, ...] = ()
    places: tuple[Place | None, ...] = ()
    guides: Guides | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "media", tuple(self.media) or tuple(range(len(self.grids))))
        object.__setattr__(self, "places", tuple(self.places) or (None,) * len(self.grids))
        total = sum(grid.num_tokens for grid in self.grids)
        if self.features.ndim != 2 or self.features.shape[0] != total:
            raise ValueError(
                f"VisualTokens: features {tuple(self.features.shape)} do not hold the {total} tokens of grids "
                f"{[str(grid) for grid in self.grids]}"
            )
        counts = [len(each) for each in (self.grids, self.kinds, self.owners, self.media, self.places)]
        if len(set(counts)) > 1:
            raise ValueError(
                "VisualTokens: {} grids, {} kinds, {} owners, {} media and {} places; there must be one of each an "
                "item".format(*counts)
            )
        if self.guides is not None and len(self.guides.index) != len(self.grids):
            raise ValueError(f"VisualTokens: {len(self.guides.index)} guides' indices for {len(self.grids)} items")

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

    @property
    def shapes(self) -> list[ItemShape]:
        """The items without their features."""
        return [ItemShape(*each) for each in zip(self.grids, self.kinds, self.media, self.places, strict=True)]

    def split(self) -> tuple[Tensor, ...]:
        """Return the features of each item, ``(n_i, D)``; views, no copies."""
        return self.features.split(self.lengths)

    def with_features(self, features: Tensor, grids: Sequence[Grid] | None = None) -> VisualTokens:
        """Return the same items with new features and, where the layout changed, new grids."""
        return replace(self, features=features, grids=self.grids if grids is None else tuple(grids))

    def with_items(self, features: Tensor, shapes: Sequence[ItemShape]) -> VisualTokens:
        """Return other items of the same media: what a block that joins or adds items gives.

        Args:
            features: ``(N', D')``.
            shapes: The new items; a medium's owner and guide are those of its first item here.
        """
        first = {medium: item for item, medium in reversed(list(enumerate(self.media)))}
        guides = self.guides
        if guides is not None:
            guides = replace(guides, index=tuple(guides.index[first[shape.medium]] for shape in shapes))
        return VisualTokens(
            features,
            tuple(shape.grid for shape in shapes),
            tuple(shape.kind for shape in shapes),
            tuple(self.owners[first[shape.medium]] for shape in shapes),
            tuple(shape.medium for shape in shapes),
            tuple(shape.place for shape in shapes),
            guides,
        )
