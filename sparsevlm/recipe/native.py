"""`model.vision.native`: what sides pictures are brought to where the tower takes them in their own shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Strict, number, view


class AreaRule(Strict):
    """Scale into a range of areas, both sides cut down to multiples (Oryx, Liu et al., arXiv:2409.12961)."""

    type: Literal["area"]
    """Kind of rule."""
    multiple: int = Field(ge=1)
    """Pixels that both sides are made a multiple of, rounded down, at least one; a multiple of the tower's patch."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Smaller pictures are scaled up to this area."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Larger pictures are scaled down to this area."""
    min_side: int | None = Field(default=None, ge=1)
    """Pictures with a side below this are first scaled so that the short side is twice as much (Oryx: 32)."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from _range_faults(raw)


class SmartRule(Strict):
    """Round both sides to the nearest multiple, keep the area in a range (`smart_resize` of Qwen2-VL)."""

    type: Literal["smart"]
    """Kind of rule."""
    multiple: int = Field(default=28, ge=1)
    """Pixels that both sides are made a multiple of; a multiple of the tower's patch."""
    min_pixels: int = Field(default=56 * 56, ge=1)
    """Least area."""
    max_pixels: int = Field(default=28 * 28 * 1280, ge=1)
    """Largest area."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from _range_faults({"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280} | raw)


class FitRule(Strict):
    """Scale down into a box, never up, and fill right and below to whole patches (Fuyu, OtterHD)."""

    type: Literal["fit"]
    """Kind of rule."""
    multiple: int = Field(default=30, ge=1)
    """Pixels that both sides are filled up to a multiple of; a multiple of the tower's patch."""
    max_width: int = Field(default=1920, ge=1)
    """Width of the box."""
    max_height: int = Field(default=1080, ge=1)
    """Height of the box."""
    fill: float = Field(default=1.0, ge=0, le=255)
    """Value of what is filled, from 0 to 255 (Fuyu's 1 is all but black)."""


NativeRule = Annotated[AreaRule | SmartRule | FitRule, Field(discriminator="type")]
"""How a size becomes sides."""


class Native(Strict):
    """Sides by kind of media, and what becomes of the tower's position embeddings."""

    image: NativeRule
    """Pictures."""
    overview: NativeRule | None = None
    """Show each picture twice, first brought to these sides (from the sides that it has by `image`)."""
    video: NativeRule | None = None
    """Frames of videos, and views of scenes; default: as `image`."""
    long_video: NativeRule | None = None
    """Frames of long videos (`model.video.long_frames` says which are); default: as `video`."""
    positions: Literal["own", "bilinear", "bicubic"] = "own"
    """How the position grid is resampled to a picture's; `own` is the tower's way (bicubic; SigLIP 2: bilinear,
    antialiased)."""


def rules_of(native: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and the options of the rules that a section, validated or not, holds."""
    options = view(native)
    for name in ("image", "overview", "video", "long_video"):
        if options.get(name) is not None:
            yield name, view(options[name])


def _range_faults(raw: dict[str, Any]) -> Iterator[CrossFault]:
    least, most = number(raw.get("min_pixels")), number(raw.get("max_pixels"))
    if least is not None and most is not None and least > most:
        yield ("min_pixels",), f"min_pixels {least} is more than max_pixels {most}"
