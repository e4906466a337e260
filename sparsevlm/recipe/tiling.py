"""`model.vision.tiling`: ways to cut pictures that are larger than what the tower sees, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sparsevlm.recipe.section import Strict

Squares = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
"""Columns and rows of squares of the tower's size."""


class _Tiling(Strict):
    """What all tilings have."""

    separators: ClassVar[tuple[str, str] | None] = None
    """Text after a slice, within a row and at its end."""


class MonkeyTiling(_Tiling):
    """A fixed number of slices and the whole picture (Monkey, Li et al., arXiv:2311.06607).

    The picture is stretched to `rows` x `columns` squares of the tower's size and cut; the slices come first, row by
    row, the whole picture, stretched to one square, last.
    """

    type: Literal["monkey"]
    """Kind of tiling."""
    rows: int = Field(default=2, ge=1)
    """Rows of slices."""
    columns: int = Field(default=2, ge=1)
    """Columns of slices."""


class AnyresTiling(_Tiling):
    """The grid of squares that fits the picture best (LLaVA-NeXT's anyres).

    The best grid keeps most of the picture's pixels, then wastes fewest. The picture is fitted into it with its aspect
    ratio, in the middle of black, and cut into squares of the tower's size; the whole picture, stretched to one square,
    comes first, then the squares row by row. For the published order of tokens let the connector end with
    `{type: layout}`.
    """

    type: Literal["anyres"]
    """Kind of tiling."""
    grids: list[Squares] = Field(default=[(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)], min_length=1)
    """Grids to choose from, each `[columns, rows]`; the first of several that fit alike is taken. LLaVA-NeXT's
    pinpoints divided by the tower's size."""


class OneVisionTiling(_Tiling):
    """All grids up to `columns` x `rows` squares, else as `anyres` (LLaVA-OneVision, Li et al., arXiv:2408.03326).

    The published limit of tokens (anyres_max_9) is `{type: layout, max_squares: 9}` in the connector.
    """

    type: Literal["onevision"]
    """Kind of tiling."""
    columns: int = Field(default=6, ge=1)
    """Most columns."""
    rows: int = Field(default=6, ge=1)
    """Most rows."""


class UhdTiling(_Tiling):
    """As many slices as the picture has pixels for, in the grid nearest to its shape (LLaVA-UHD, arXiv:2403.11703).

    A picture of at most one square's area is not cut. Else its area in squares, rounded up, is the wanted number of
    slices; of the grids of one less, as many and one more, the one whose aspect ratio is nearest to the picture's (in
    logarithms) is taken. Slices come first, row by row, each followed by a comma, the last of a row by a newline, both
    text tokens of the language model; the whole picture comes last.

    Deviation: slices keep the aspect ratio in the original, for which the tower's positions are interpolated; here
    each is stretched to the tower's square.
    """

    separators: ClassVar[tuple[str, str] | None] = (",", "\n")

    type: Literal["uhd"]
    """Kind of tiling."""
    max_slices: int = Field(default=7, ge=1)
    """Most slices."""
    scale: int | None = Field(default=None, ge=1)
    """Side in pixels of the square whose area is one slice's; default: the tower's size."""


Tiling = Annotated[MonkeyTiling | AnyresTiling | OneVisionTiling | UhdTiling, Field(discriminator="type")]
"""What `tiling` may be."""

STRETCHED = ("monkey", "uhd")
"""Types whose slices leave the picture's aspect ratio: no part of them is padding."""
