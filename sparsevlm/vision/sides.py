"""Sides of pictures at native resolution: pure functions of sizes."""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import NamedTuple

from sparsevlm.data.sample import BadSampleError
from sparsevlm.recipe.native import AreaRule, FitRule, Native, NativeRule, SmartRule
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind, Place

Size = tuple[int, int]
"""``(width, height)`` in pixels."""

SMART_RATIO = 200
"""Largest ratio of the sides that `SmartRule` takes, as Qwen2-VL's `smart_resize`."""


class Sides(NamedTuple):
    """What becomes of a picture: resized to `content`, then filled right and below up to `canvas`."""

    content: Size
    canvas: Size


class NativeView(NamedTuple):
    """One item of a medium at native resolution: its kind, place and sides."""

    kind: MediaKind
    place: Place | None
    sides: Sides


def sides(rule: NativeRule, size: Size) -> Sides:
    """Return the sides that a rule brings a picture to.

    Args:
        rule: The rule.
        size: The picture's size.

    Raises:
        BadSampleError: The picture is too long for the rule.
    """
    if isinstance(rule, AreaRule):
        target = _area(rule, size)
        return Sides(target, target)
    if isinstance(rule, SmartRule):
        target = _smart(rule, size)
        return Sides(target, target)
    return _fit(rule, size)


def _area(rule: AreaRule, size: Size) -> Size:
    """Scale by area, then round down to multiples.

    *Deviations* from Oryx (`oryx/mm_utils.py`, `resize`): a side below one multiple becomes one multiple; there it
    becomes 0 and the run crashes.
    """
    width, height = size
    if rule.min_side is not None and min(size) < rule.min_side:
        scale = 2 * rule.min_side / min(size)
        width, height = int(width * scale), int(height * scale)
    scale, area = 1.0, width * height
    if rule.max_pixels is not None and area > rule.max_pixels:
        scale = sqrt(rule.max_pixels / area)
    elif rule.min_pixels is not None and area < rule.min_pixels:
        scale = sqrt(rule.min_pixels / area)
    m = rule.multiple
    return max(int(width * scale / m), 1) * m, max(int(height * scale / m), 1) * m


def _smart(rule: SmartRule, size: Size) -> Size:
    """Round to the nearest multiple; where that leaves the range of areas, scale and round into it."""
    width, height = size
    if max(size) > SMART_RATIO * min(size):
        raise BadSampleError(
            f"a picture of {width}x{height} pixels: rule 'smart' takes sides that differ at most {SMART_RATIO} times"
        )
    m = rule.multiple
    w, h = round(width / m) * m, round(height / m) * m
    if w * h > rule.max_pixels:
        scale = sqrt(width * height / rule.max_pixels)
        w, h = max(m, floor(width / scale / m) * m), max(m, floor(height / scale / m) * m)
    elif w * h < rule.min_pixels:
        scale = sqrt(rule.min_pixels / (width * height))
        w, h = ceil(width * scale / m) * m, ceil(height * scale / m) * m
    return w, h


def _fit(rule: FitRule, size: Size) -> Sides:
    """Scale down into the box, fill to multiples."""
    width, height = size
    if width > rule.max_width or height > rule.max_height:
        scale = min(rule.max_width / width, rule.max_height / height)
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    m = rule.multiple
    return Sides((width, height), (ceil(width / m) * m, ceil(height / m) * m))


def native_views(native: Native, kind: MediaKind, size: Size) -> list[NativeView]:
    """Return the items of a medium and their sides, in the order of its tokens.

    Args:
        native: The rules.
        kind: Of the medium, long videos told from others.
        size: Of the picture or the first frame, which the others are brought to.
    """
    if kind is not MediaKind.IMAGE:
        rule = native.video or native.image
        if kind is MediaKind.LONG_VIDEO:
            rule = native.long_video or rule
        return [NativeView(kind, None, sides(rule, size))]
    whole = sides(native.image, size)
    if native.overview is None:
        return [NativeView(kind, None, whole)]
    width, height = size
    return [
        NativeView(kind, Place(-1, -1, 1, 1, height, width), sides(native.overview, whole.content)),
        NativeView(kind, Place(0, 0, 1, 1, height, width), whole),
    ]


def native_items(native: Native, patch: int, kind: MediaKind, num_frames: int, size: Size) -> list[ItemShape]:
    """Return the items of a medium as patch grids; see `native_views`.

    Args:
        native: The rules.
        patch: Side of a token's square in pixels.
        kind: Of the medium, long videos told from others.
        num_frames: Frames of a video, views of a scene.
        size: Of the picture or the first frame.
    """
    items = []
    for view in native_views(native, kind, size):
        width, height = view.sides.canvas
        assert width % patch == height % patch == 0, "ImageSpec checks that rules give whole patches"
        grid = Grid(1 if kind is MediaKind.IMAGE else num_frames, height // patch, width // patch)
        items.append(ItemShape(grid, view.kind, 0, view.place))
    return items


__all__ = ["NativeView", "Sides", "Size", "native_items", "native_views", "sides"]
