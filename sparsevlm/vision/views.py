"""How a picture is cut into frames for the tower: pure functions of its size.

A *view* is one frame: the picture brought to some size, and the part of it that the frame shows. Tilings give several,
which become the items of one medium.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from sparsevlm.recipe.tiling import AnyresTiling, MonkeyTiling, OneVisionTiling, Tiling
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
        corner: ``(left, top)`` of the frame on the resized picture; negative where the frame begins outside it.
        frame: Size of the frame.
        black: What lies outside the resized picture is black; else it has the mean colour.
    """

    kind: MediaKind
    place: Place
    size: Size
    corner: tuple[int, int]
    frame: Size
    black: bool = False


def picture_views(tiling: Tiling, side: int, size: Size) -> list[View]:
    """Return the frames of a picture, in the order of its tokens.

    Args:
        tiling: How to cut.
        side: Side in pixels of the square that the tower sees.
        size: The picture's.
    """
    if isinstance(tiling, MonkeyTiling):
        return [*_cut((tiling.columns, tiling.rows), side, size), _overview((tiling.columns, tiling.rows), side, size)]
    if isinstance(tiling, AnyresTiling | OneVisionTiling):
        grids = tiling.grids if isinstance(tiling, AnyresTiling) else _all_grids(tiling.columns, tiling.rows)
        grid = best_grid(grids, side, size)
        whole = (grid[0] * side, grid[1] * side)
        return [_overview(grid, side, size), *_cut(grid, side, size, fit_size(size, whole))]
    grid = uhd_grid(size, tiling.max_slices, tiling.scale or side)
    return [*(_cut(grid, side, size) if grid else ()), _overview(grid or (0, 0), side, size)]


def best_grid(grids: Iterable[tuple[int, int]], side: int, size: Size) -> tuple[int, int]:
    """Return the grid of squares that a picture fits best: LLaVA-NeXT's `select_best_resolution`.

    The one that keeps most pixels of the picture (never more than it has), then the one that wastes fewest, then the
    first. In floating point as in the original, whose rounding down decides near ties.

    Args:
        grids: Each ``(columns, rows)``; at least one.
        side: Side in pixels of a square.
        size: The picture's.
    """

    def fitness(grid: tuple[int, int]) -> tuple[int, int]:
        width, height = grid[0] * side, grid[1] * side
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - width * height

    return max(grids, key=fitness)  # the first of equals


def fit_size(size: Size, whole: Size) -> Size:
    """Return the size of a picture that is fitted into `whole` with its aspect ratio, rounded up as LLaVA-NeXT does."""
    by_width, by_height = whole[0] / size[0], whole[1] / size[1]
    if by_width < by_height:
        return whole[0], min(math.ceil(size[1] * by_width), whole[1])
    return min(math.ceil(size[0] * by_height), whole[0]), whole[1]


def uhd_grid(size: Size, max_slices: int, scale: int) -> tuple[int, int] | None:
    """Return ``(columns, rows)`` of LLaVA-UHD's slices, None for a picture that is not cut.

    Among equally near aspect ratios the first in the order of the original counts: fewer slices, then fewer columns;
    equal up to floating point, as there.

    Args:
        size: The picture's.
        max_slices: Most slices.
        scale: Side in pixels of the square whose area is one slice's.
    """
    wanted = min(math.ceil(size[0] * size[1] / scale**2), max_slices)
    if wanted <= 1:
        return None
    numbers = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= max_slices]
    grids = [(columns, n // columns) for n in numbers for columns in range(1, n + 1) if n % columns == 0]
    ratio = math.log(size[0] / size[1])
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))


def _all_grids(columns: int, rows: int) -> list[tuple[int, int]]:
    return list(product(range(1, columns + 1), range(1, rows + 1)))


def _overview(grid: tuple[int, int], side: int, size: Size) -> View:
    """The whole picture stretched to one square."""
    place = Place(-1, -1, grid[1], grid[0], size[1], size[0])
    return View(MediaKind.IMAGE, place, (side, side), (0, 0), (side, side))


def _cut(grid: tuple[int, int], side: int, size: Size, resized: Size | None = None) -> Iterator[View]:
    """The squares of a grid, row by row; the picture fills it or, where `resized` is given, lies amid black."""
    columns, rows = grid
    whole = (columns * side, rows * side)
    inside = resized or whole
    left, top = (whole[0] - inside[0]) // 2, (whole[1] - inside[1]) // 2
    for row, column in product(range(rows), range(columns)):
        place = Place(row, column, rows, columns, size[1], size[0])
        corner = (column * side - left, row * side - top)
        yield View(MediaKind.SLICE, place, inside, corner, (side, side), resized is not None)
