"""`model.vision.tiling`: ways to cut pictures that are larger than what the tower sees, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsevlm.recipe.section import Strict


class MonkeyTiling(Strict):
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


Tiling = Annotated[MonkeyTiling, Field()]
"""What `tiling` may be."""
