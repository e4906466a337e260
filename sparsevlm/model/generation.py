"""Media of a batch that `generate` expands for beams and several return sequences."""

from __future__ import annotations

import torch
from torch import Tensor

GUIDE_INPUTS = ("guide_ids", "guide_mask")
"""Model inputs whose first dimension is texts; `media_guides` says which item has which."""

MEDIA_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "media_kinds",
    "media_owners",
    "media_places",
    *GUIDE_INPUTS,
    "media_guides",
)
"""Model inputs whose first dimension is frames, visual items or their texts, not rows."""


def repeat_media(media: dict[str, Tensor], copies: int) -> dict[str, Tensor]:
    """Repeat each row's media as `generate` repeats the rows: 0, 0, 1, 1, ….

    Args:
        media: The inputs of `MEDIA_INPUTS`; ``media_owners`` names the row of each item.
        copies: How often each row is repeated.

    Returns:
        The same inputs for the expanded batch: all items of a row follow each other, copy by copy.
    """
    owners = media["media_owners"].tolist()
    grids, pixels = media["image_grid_thw"], media["pixel_values"]
    frames = pixels.split((grids[:, 0] if pixels.ndim == 4 else grids.prod(dim=1)).tolist())  # or patches
    order, rows, media_of = [], [], []
    of = media["media_places"][:, 0].tolist() if "media_places" in media else list(range(len(owners)))
    for row in sorted(set(owners)):
        items = [i for i, owner in enumerate(owners) if owner == row]
        for copy in range(copies):
            order += items
            rows += [row * copies + copy] * len(items)
            media_of += [of[i] * copies + copy for i in items]
    index = torch.tensor(order, device=media["image_grid_thw"].device)
    kept = ("pixel_values", "media_owners", *GUIDE_INPUTS)  # all rows may look at the same texts
    repeated = {key: value[index] for key, value in media.items() if key not in kept}
    repeated |= {key: media[key] for key in GUIDE_INPUTS if key in media}
    repeated["pixel_values"] = torch.cat([frames[i] for i in order])
    if "media_places" in media:
        repeated["media_places"][:, 0] = torch.tensor(media_of, device=index.device)
    repeated["media_owners"] = torch.tensor(rows, device=index.device)
    return repeated
