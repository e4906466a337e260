"""What the model does with media: tower, connector, and visual features in the places of their placeholders.

Legend: B rows, T tokens a row, H language width, F frames of all visual items together, I visual items, D tower width,
N visual tokens after the connector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.connectors.base import connector_guide, parse_connector
from sparsevlm.recipe.native import Native
from sparsevlm.vision.encoder import default_image_size, encode_frames, output_grid
from sparsevlm.vision.frames import encoding, frame_positions
from sparsevlm.vision.native import encode_native, patch_side
from sparsevlm.vision.sides import native_items
from sparsevlm.vision.tokens import MEDIA_KINDS, NO_PLACE, Grid, Guides, ItemShape, MediaKind, Place, VisualTokens


def read_items(
    image_grid_thw: Tensor, media_kinds: Tensor | None, media_owners: Tensor | None, media_places: Tensor | None
) -> tuple[list[ItemShape], tuple[int, ...]]:
    """Return the visual items of a batch and the sample of each, from the tensors that `Collator` makes of them."""
    grids = [Grid(*row) for row in image_grid_thw.tolist()]
    kinds = [MediaKind.IMAGE] * len(grids) if media_kinds is None else [MEDIA_KINDS[i] for i in media_kinds.tolist()]
    owners = range(len(grids)) if media_owners is None else media_owners.tolist()
    media, places = range(len(grids)), [None] * len(grids)
    if media_places is not None:
        media, *_ = zip(*media_places.tolist(), strict=True)
        read = [Place(*row[1:]) for row in media_places.tolist()]
        places = [None if place == NO_PLACE else place for place in read]
    return [ItemShape(*each) for each in zip(grids, kinds, media, places, strict=True)], tuple(owners)


def read_guides(guide_ids: Tensor | None, guide_mask: Tensor | None, media_guides: Tensor | None) -> Guides | None:
    """Return the texts of a batch, from the tensors that `Collator` makes of them."""
    if guide_ids is None or guide_mask is None or media_guides is None:
        return None
    return Guides(guide_ids, guide_mask, tuple(media_guides.tolist()))


class VisualMixin:
    """Of a model that has `config`, `vision_tower` and `connector`."""

    config: Any
    vision_tower: nn.Module
    connector: nn.ModuleList

    def encode_media(
        self, pixel_values: Tensor, items: Sequence[ItemShape], owners: Sequence[int], guides: Guides | None = None
    ) -> VisualTokens:
        """Run the vision tower and the connector.

        Args:
            pixel_values: ``(F, 3, height, width)``, frames of all items in order; at native resolution their patches
                ``(P, 3 * patch * patch)``.
            items: The items as they leave the tower.
            owners: Sample that each item belongs to.
            guides: Texts for blocks that look at text.

        Returns:
            The visual tokens, ``(N, H)``.
        """
        frozen = not any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        # Slices count within their picture; where nothing says which picture, within their sample.
        pictures = [(owner, item.medium if item.place else None) for item, owner in zip(items, owners)]
        grids, kinds, media, places = zip(*items, strict=True)
        grad = torch.set_grad_enabled(torch.is_grad_enabled() and not frozen)
        with grad, encoding(frame_positions(grids, kinds, pictures)):
            features = self._features(pixel_values, grids)  # (N, D)
        tokens = VisualTokens(features, grids, kinds, tuple(owners), media, places, guides)
        for block in self.connector:
            tokens = block(tokens)
        return tokens

    def _features(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return what the tower gives, ``(N, D)``."""
        config = self.config
        if config.vision_native is not None:
            features = encode_native(self.vision_tower, pixel_values, grids, config.vision_feature_layer)
            if next(self.vision_tower.parameters(), None) is None:  # a tower without weights has no type
                features = features.to(next((p.dtype for p in self.connector.parameters()), features.dtype))
            return features
        return encode_frames(
            self.vision_tower,
            pixel_values,
            layer=config.vision_feature_layer,
            select=config.vision_feature_select,
        ).flatten(0, 1)

    def touch_vision(self, inputs_embeds: Tensor) -> Tensor:
        """Give a text-only training batch a zero-weighted path through tower and connector.

        Without it, ranks of a sharded run disagree on which parameters take part in a step and hang (ZeRO-3) or abort.
        """
        tokens = self.encode_nothing(inputs_embeds.device)
        return inputs_embeds + 0.0 * tokens.features.sum().to(inputs_embeds.dtype)

    def encode_nothing(self, device: torch.device) -> VisualTokens:
        """Return the visual tokens of a black picture."""
        config = self.config
        items, shape = self._least_picture()
        # A tower without weights has no type: pixels stay as they are.
        dtype = next((p.dtype for p in self.vision_tower.parameters()), torch.float32)
        pixels = torch.zeros(shape, dtype=dtype, device=device)
        guides = None
        if connector_guide(parse_connector(config.connector)) is not None:
            text = torch.zeros(1, 1, dtype=torch.long, device=device)
            guides = Guides(text, text + 1, (0,) * len(items))
        return self.encode_media(pixels, items, [0] * len(items), guides)

    def placeholders(self, input_ids: Tensor) -> Tensor:
        """Return which tokens stand for visual ones, ``(B, T)`` bool."""
        return (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)

    def _least_picture(self) -> tuple[list[ItemShape], tuple[int, ...]]:
        """Return the items of the smallest picture that there can be, and the shape of its pixels."""
        config = self.config
        if config.vision_native is not None:
            patch = patch_side(config.vision_config)
            items = native_items(Native.model_validate(config.vision_native), patch, MediaKind.IMAGE, 1, (1, 1))
            return items, (sum(item.grid.num_tokens for item in items), 3 * patch**2)
        size = config.image_size or default_image_size(config.vision_config)
        h, w = output_grid(config.vision_config, size, config.vision_feature_layer, config.vision_feature_select)
        return [ItemShape(Grid(1, h, w), MediaKind.IMAGE)], (1, 3, size, size)

    def write_media(self, input_ids: Tensor, inputs_embeds: Tensor, tokens: VisualTokens) -> Tensor:
        """Write visual features over their placeholders, in reading order."""
        mask = self.placeholders(input_ids)  # (B, T)
        placeholders = int(mask.sum())
        if placeholders != tokens.features.shape[0]:
            raise ValueError(
                f"the prompt holds {placeholders} visual placeholders but the media give {tokens.features.shape[0]} "
                f"visual tokens ({len(tokens)} items: {tokens.lengths[:16]}); encode prompts with SparseVLMProcessor"
            )
        features = tokens.features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)
