"""Media of a batch that `generate` expands for beams and several return sequences."""

from __future__ import annotations

import torch
from torch import Tensor

GUIDE_INPUTS = ("guide_ids", "guide_mask")
"""Model inputs whose first dimension is texts; `media_guides` says which item has which."""

MEDIA_INPUTS = (
    "pixel_values",
    "visual_features",
    "feature_towers",
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
    grids, known = media["image_grid_thw"], media.get("feature_towers")
    known = torch.zeros_like(grids[:, 0], dtype=torch.bool) if known is None else known > 0
    order, rows, media_of = [], [], []
    of = media["media_places"][:, 0].tolist() if "media_places" in media else list(range(len(owners)))
    for row in sorted(set(owners)):
        items = [i for i, owner in enumerate(owners) if owner == row]
        for copy in range(copies):
            order += items
            rows += [row * copies + copy] * len(items)
            media_of += [of[i] * copies + copy for i in items]
    index = torch.tensor(order, device=media["image_grid_thw"].device)
    kept = ("pixel_values", "visual_features", "media_owners", *GUIDE_INPUTS)  # all rows may look at the same texts
    repeated = {key: value[index] for key, value in media.items() if key not in kept}
    repeated |= {key: media[key] for key in GUIDE_INPUTS if key in media}
    for name, own in (("pixel_values", ~known), ("visual_features", known)):
        if name not in media:
            continue
        sizes = grids[:, 0] if media[name].ndim == 4 else grids.prod(dim=1)  # frames; or patches, or features
        parts = media[name].split((sizes * own).tolist())
        repeated[name] = torch.cat([parts[i] for i in order])
    if "media_places" in media:
        repeated["media_places"][:, 0] = torch.tensor(media_of, device=index.device)
    repeated["media_owners"] = torch.tensor(rows, device=index.device)
    return repeated
