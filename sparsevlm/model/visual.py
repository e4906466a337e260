"""What the model does with media: tower, connector, and visual features in the places of their placeholders.

Legend: B rows, T tokens a row, H language width, F frames of all visual items together, I visual items, D tower width,
N visual tokens after the connector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsevlm.connectors.base import connector_guide, parse_connector
from sparsevlm.data.kept import tower_number
from sparsevlm.recipe.native import Native
from sparsevlm.vision.encoder import default_image_size, encode_frames, output_grid
from sparsevlm.vision.feature_store import take_features, tower_identity, weights_state
from sparsevlm.vision.frames import encoded_positions, encoding, frame_blocks, frame_positions
from sparsevlm.vision.native import encode_native, patch_side
from sparsevlm.vision.sides import native_items
from sparsevlm.vision.tokens import MEDIA_KINDS, NO_PLACE, Grid, Guides, ItemShape, MediaKind, Place, VisualTokens

FRAMES_AT_ONCE, PATCHES_AT_ONCE = 64, 1 << 16
"""What goes through a tower at once where no gradient is kept: squares, or patches of pictures in their own shape."""


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


class KnownFeatures(NamedTuple):
    """Features that were computed before.

    Attributes:
        features: ``(M, D)`` of all items that have them, in order.
        towers: Number of the tower that gave each item's; 0: pixels are there.
    """

    features: Tensor
    towers: tuple[int, ...]


def read_known(visual_features: Tensor | None, feature_towers: Tensor | None) -> KnownFeatures | None:
    """Return what a batch says of features that were computed before, from the tensors of `kept_inputs`."""
    if visual_features is None or feature_towers is None:
        return None
    return KnownFeatures(visual_features, tuple(feature_towers.tolist()))


class VisualMixin:
    """Of a model that has `config`, `vision_tower` and `connector`."""

    config: Any
    vision_tower: nn.Module
    connector: nn.ModuleList
    training: bool
    _identity: tuple[Any, str] | None = None

    def encode_media(
        self,
        pixel_values: Tensor | None,
        items: Sequence[ItemShape],
        owners: Sequence[int],
        guides: Guides | None = None,
        known: KnownFeatures | None = None,
    ) -> VisualTokens:
        """Run the vision tower and the connector.

        Args:
            pixel_values: ``(F, 3, height, width)``, frames of all items in order; at native resolution their patches
                ``(P, 3 * patch * patch)``. Without those of items whose features are known; None where all are.
            items: The items as they leave the tower.
            owners: Sample that each item belongs to.
            guides: Texts for blocks that look at text.
            known: Features of items that were computed before.

        Returns:
            The visual tokens, ``(N, H)``.

        Raises:
            ValueError: Features were computed by another tower, or the tower trains.
        """
        grids, kinds, media, places = zip(*items, strict=True)
        features = self.tower_features(pixel_values, items, owners, known)  # (N, D)
        tokens = VisualTokens(features, grids, kinds, tuple(owners), media, places, guides)
        for block in self.connector:
            tokens = block(tokens)
        return tokens

    def tower_features(
        self,
        pixel_values: Tensor | None,
        items: Sequence[ItemShape],
        owners: Sequence[int],
        known: KnownFeatures | None = None,
    ) -> Tensor:
        """Return what the tower gives for items, ``(N, D)``; arguments and errors are those of `encode_media`."""
        if known is not None:
            self._check_tower(known)
        new = [known is None or not known.towers[i] for i in range(len(items))]
        if (pixel_values is not None) != any(new):
            raise ValueError("each visual item needs its pixels, or features that were computed before")
        given = None if known is None else self._as_given(known.features)
        if pixel_values is None:
            assert given is not None
            return given
        # Slices count within their picture; where nothing says which picture, within their sample.
        pictures = [(owner, item.medium if item.place else None) for item, owner in zip(items, owners)]
        grids, kinds, own = zip(*((item.grid, item.kind, p) for item, p, n in zip(items, pictures, new) if n))
        frozen = not any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        grad = torch.set_grad_enabled(torch.is_grad_enabled() and not frozen)
        with grad, encoding(frame_positions(grids, kinds, own)):
            computed = self._features(pixel_values, grids)
        if frozen:
            take_features(computed)
        if given is None:
            return computed
        sizes = [item.grid.num_tokens for item in items]
        seen = iter(computed.split([size for size, n in zip(sizes, new) if n]))
        read = iter(given.split([size for size, n in zip(sizes, new) if not n]))
        return torch.cat([next(seen if n else read) for n in new])

    def _as_given(self, features: Tensor) -> Tensor:
        """Return features in the type that the tower gives; under autocast blocks cast what they get."""
        if torch.is_autocast_enabled(features.device.type):
            return features
        parameters = (*self.vision_tower.parameters(), *self.connector.parameters())
        return features.to(next((parameter.dtype for parameter in parameters), features.dtype))

    def _check_tower(self, known: KnownFeatures) -> None:
        """Refuse features of another tower."""
        if self.training and any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            raise ValueError(
                "media are given as features that were computed before, but the tower trains: its features change with "
                "every step. Leave 'vision' out of what the stage trains, or name the films themselves"
            )
        own = tower_number(self.tower_identity())
        if set(known.towers) - {0, own}:
            raise ValueError(
                "media are given as features that another tower computed (other weights, another layer or selection); "
                "make them anew with `sparsevlm features`, from this model"
            )

    def tower_identity(self) -> str:
        """Return the name of the tower and of what is taken from it, by which its features are told from others'."""
        config, state = self.config, weights_state(self.vision_tower)
        if self._identity is None or self._identity[0] != state:
            reading = {
                "layer": config.vision_feature_layer,
                "select": config.vision_feature_select,
                "native": config.vision_native,
            }
            self._identity = state, tower_identity(self.vision_tower, **reading)
        return self._identity[1]

    def _features(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return what the tower gives for pixels, ``(N, D)``.

        Where no gradient is kept, block by block: the tower's memory does not grow with a film. Not where its weights
        are sharded, since ranks must then call it equally often.
        """
        positions = encoded_positions()
        assert positions is not None
        sharded = any(hasattr(parameter, "ds_id") for parameter in self.vision_tower.parameters())
        if torch.is_grad_enabled() or sharded:
            return self._encode(pixel_values, grids)
        blocks = frame_blocks(grids, *((PATCHES_AT_ONCE, True) if pixel_values.ndim == 2 else (FRAMES_AT_ONCE, False)))
        features = []
        for block in blocks:
            with encoding(positions[block.frames]):
                features.append(self._encode(pixel_values[block.rows], block.grids))
        return features[0] if len(features) == 1 else torch.cat(features)

    def _encode(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
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
