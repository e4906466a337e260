"""Pixels of pictures at native resolution, cut into patches.

Legend: P patches of all items together, p side of a patch in pixels, h x w patches of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from sparsevlm.recipe.native import FitRule, Native
from sparsevlm.vision.sides import NativeView, native_views
from sparsevlm.vision.tokens import MediaKind


def native_patches(
    frames: Iterable[Image.Image],
    num_frames: int,
    kind: MediaKind,
    native: Native,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: Image.Resampling,
) -> Tensor:
    """Return the patches of a medium, as `native_items` counts them.

    Args:
        frames: RGB pictures; one is held at a time. Those after the first are brought to its sides.
        num_frames: Their number.
        kind: Of the medium, long videos told from others.
        native: The rules.
        patch: p.
        mean: Channel means of pixels in [0, 1].
        std: Channel standard deviations.
        resample: Filter of the resize.

    Returns:
        ``(P, 3 * p * p)`` float32: items and frames in order, each in raster order of its patches; within a patch
        channel, row, column.
    """
    upcoming = iter(frames)
    first = next(upcoming)
    views = native_views(native, kind, first.size)
    fills = [_fill(native, view, views) for view in views]
    counts = [width * height // patch**2 for width, height in (view.sides.canvas for view in views)]
    patches = torch.empty(num_frames * sum(counts), 3 * patch**2)
    parts = [part.unflatten(0, (num_frames, -1)) for part in patches.split([num_frames * count for count in counts])]
    for i, frame in enumerate(chain([first], upcoming)):
        for view, fill, part in list(zip(views, fills, parts, strict=True))[::-1]:
            # The whole picture comes last; an overview is made of it as it is then.
            size = view.sides.content
            frame = frame if frame.size == size else frame.resize(size, resample)
            _write(part[i], frame, view, fill)
    colours = patches.view(-1, 3, patch**2)
    colours.div_(255).sub_(torch.tensor(mean).view(3, 1)).div_(torch.tensor(std).view(3, 1))
    return patches


def unpatchify(patches: Tensor, h: int, w: int) -> Tensor:
    """Put ``(h * w, 3 * p * p)`` patches together again: ``(3, h * p, w * p)``."""
    patch = int((patches.shape[1] // 3) ** 0.5)
    return patches.view(h, w, 3, patch, patch).permute(2, 0, 3, 1, 4).reshape(3, h * patch, w * patch)


def _fill(native: Native, view: NativeView, views: Sequence[NativeView]) -> float | None:
    """Return the value of what is filled; None where nothing is."""
    if view.sides.content == view.sides.canvas:
        return None
    rule = native.overview if view is not views[-1] else native.image if view.kind is MediaKind.IMAGE else None
    if rule is None:
        rule = native.video or native.image
        if view.kind is MediaKind.LONG_VIDEO:
            rule = native.long_video or rule
    assert isinstance(rule, FitRule), "only this rule fills"
    return rule.fill


def _write(patches: Tensor, picture: Image.Image, view: NativeView, fill: float | None) -> None:
    """Write a picture's pixels, from 0 to 255, into its ``(h * w, 3 * p * p)`` patches."""
    import numpy as np

    (width, height), (full_width, full_height) = view.sides
    patch = round((patches.shape[1] // 3) ** 0.5)
    pixels = torch.from_numpy(np.array(picture))  # (height, width, 3) uint8
    if fill is not None:
        dtype = torch.uint8 if float(fill).is_integer() else torch.float32
        canvas = torch.full((full_height, full_width, 3), fill, dtype=dtype)
        canvas[:height, :width] = pixels
        pixels = canvas
    rows = pixels.view(full_height // patch, patch, full_width // patch, patch, 3)
    patches.view(full_height // patch, full_width // patch, 3, patch, patch).copy_(rows.permute(0, 2, 4, 1, 3))
