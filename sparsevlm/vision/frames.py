"""Where in its picture or video each frame is that goes through the tower.

The model says it for the length of an encoding; adapters of the tower that tell frames apart read it.

Legend: F frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from sparsevlm.vision.tokens import Grid, MediaKind

WHOLE = -1
"""Position of a frame that is a whole picture."""

_POSITIONS: ContextVar[tuple[int, ...] | None] = ContextVar("sparsevlm_frame_positions", default=None)


def frame_positions(grids: Sequence[Grid], kinds: Sequence[MediaKind], owners: Sequence[Any]) -> tuple[int, ...]:
    """Return the position of each frame, ``(F,)``.

    - A picture (image) is `WHOLE`, and so is the global view of a picture that is cut up, which is an image item.
    - Frames of a video and views count from 0 within their item.
    - Slices count from 0 within their picture: over slice items of one owner (a picture, or where nothing names it a
      sample) that follow each other, until an item of another kind (the global view) ends the picture. One item may
      hold one slice or all of them.
    """
    positions: list[int] = []
    run, last = 0, None
    for grid, kind, owner in zip(grids, kinds, owners, strict=True):
        if kind is not MediaKind.SLICE:
            run, last = 0, None
            positions += [WHOLE] * grid.t if kind is MediaKind.IMAGE else range(grid.t)
            continue
        if owner != last:
            run, last = 0, owner
        positions += range(run, run + grid.t)
        run += grid.t
    return tuple(positions)


class Block(NamedTuple):
    """Some of the frames of a batch.

    Attributes:
        grids: Items of these frames alone.
        frames: Which frames they are.
        rows: Which rows of the pixels.
    """

    grids: tuple[Grid, ...]
    frames: slice
    rows: slice


def frame_blocks(grids: Sequence[Grid], most: int, packed: bool) -> list[Block]:
    """Return the frames of items in blocks, in order.

    Args:
        grids: Of the items.
        most: Rows of a block; a frame that has more by itself is one.
        packed: A frame is as many rows as it has tokens (patches), else one row.
    """
    blocks: list[Block] = []
    own: list[Grid] = []
    first = frame = start = row = 0
    for grid in grids:
        size = grid.h * grid.w if packed else 1
        left = grid.t
        while left:
            take = min(left, (most - (row - start)) // size)
            if not take and row > start:
                blocks.append(Block(tuple(own), slice(first, frame), slice(start, row)))
                own, first, start = [], frame, row
                continue
            take = max(take, 1)
            own.append(grid._replace(t=take))
            frame, row, left = frame + take, row + take * size, left - take
    return [*blocks, Block(tuple(own), slice(first, frame), slice(start, row))]


@contextmanager
def encoding(positions: Sequence[int]) -> Iterator[None]:
    """Say where the frames are that go through the tower inside."""
    token = _POSITIONS.set(tuple(positions))
    try:
        yield
    finally:
        _POSITIONS.reset(token)


def encoded_positions() -> tuple[int, ...] | None:
    """Return what `encoding` says."""
    return _POSITIONS.get()
