"""How a picture is cut into frames for the tower: pure functions of its size.

A *view* is one frame: the picture brought to some size, and the part of it that the frame shows. Tilings give several,
which become the items of one medium.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsevlm.recipe.tiling import MonkeyTiling, Tiling
from sparsevlm.vision.tokens import MediaKind, Place

Size = tuple[int, int]
"""``(width, height)`` in pixels."""


@dataclass(frozen=True)
class View:
    """One frame of a picture.

    Attributes:
        kind: `SLICE`, or `IMAGE` for what shows the whole picture.
        place: Where it lies in the picture.
        size: What the picture is resized to.
        corner: ``(left, top)`` of the frame on the resized picture; negative where the frame begins outside it, which
            is filled with the mean colour, as is what lies beyond its other end.
        frame: Size of the frame.
    """

    kind: MediaKind
    place: Place
    size: Size
    corner: tuple[int, int]
    frame: Size


def picture_views(tiling: Tiling, side: int, size: Size) -> list[View]:
    """Return the frames of a picture, in the order of its tokens.

    Args:
        tiling: How to cut.
        side: Side in pixels of the square that the tower sees.
        size: The picture's.
    """
    return list(_monkey(tiling, side, size))


def _monkey(tiling: MonkeyTiling, side: int, size: Size) -> Iterator[View]:
    rows, columns = tiling.rows, tiling.columns
    whole = (columns * side, rows * side)
    for row in range(rows):
        for column in range(columns):
            place = Place(row, column, rows, columns, size[1], size[0])
            yield View(MediaKind.SLICE, place, whole, (column * side, row * side), (side, side))
    yield View(MediaKind.IMAGE, Place(-1, -1, rows, columns, size[1], size[0]), (side, side), (0, 0), (side, side))
