"""Towers that see pictures in their own shape: packed patches of all frames, attention within each.

A ViT of transformers runs as it is, over one row of all patches of a batch. Only two things of it look beyond a token:
its embeddings, which get a subclass that lays the position grid over each picture, and its attention, which goes
through transformers' attention interface and keeps frames apart. What a pass holds travels in a context variable.

The rules are OryxViT's (Liu et al., arXiv:2409.12961; `oryx/model/multimodal_encoder/oryx_vit.py`): the position grid
resampled to each picture's patch grid, block-diagonal attention, all else token by token.

Qwen's towers, which take pictures of any shape by themselves, are in `vision.qwen`.

Legend: P patches of all items, p side of a patch, F frames, n tokens a frame (its prefix tokens and patches), N all
tokens, D width, G side of the trained position grid, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.recipe.native import rules_of
from sparsevlm.recompute import carry_to_recomputation, setting
from sparsevlm.vision.encoder import as_layers, build_tower, default_image_size, plain_modules
from sparsevlm.vision.packed import ATTENTION, RUNNING, Pass
from sparsevlm.vision.qwen import QWEN, make_packed
from sparsevlm.vision.qwen import encode as encode_qwen
from sparsevlm.vision.tokens import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class _Own(NamedTuple):
    """How a class resamples its position grid by itself."""

    mode: str = "bicubic"
    antialias: bool = False


class _PackedEmbeddings:
    """Mixed into a tower's embeddings: inside a native pass they take packed patches."""

    own = _Own()
    positions: str = "own"
    patch_embedding: Any
    position_embedding: Any

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``(1, N, D)`` for patches ``(P, 3 * p * p)``; outside a native pass what the class returns."""
        running = RUNNING.get()
        if running is None:
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]
        patches = self.embed(pixel_values)  # (P, D)
        prefix, table = self.tables()  # (p, D), (G * G, D)
        side = round(table.shape[0] ** 0.5)
        rows, start = [], 0
        for grid in running.grids:
            end = start + grid.num_tokens
            frames = patches[start:end].unflatten(0, (grid.t, -1)) + self.resample(table, side, grid)  # (t, h * w, D)
            rows.append(torch.cat([prefix.expand(grid.t, -1, -1), frames], dim=1).flatten(0, 1))
            start = end
        return getattr(self, "dropout", nn.Identity())(torch.cat(rows)[None])

    def embed(self, patches: Tensor) -> Tensor:
        """Return ``(P, D)``: the tower's convolution over one row of patches."""
        return self._convolve(self.patch_embedding, patches)

    @staticmethod
    def _convolve(convolution: Any, patches: Tensor) -> Tensor:
        side = round((patches.shape[1] // 3) ** 0.5)
        row = patches.view(-1, 3, side, side).permute(1, 2, 0, 3).flatten(2)  # (3, p, P * p)
        return convolution(row[None])[0, :, 0].T

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return prefix tokens with their positions ``(p, D)`` and the position grid ``(G * G, D)``."""
        every = torch.arange(self.position_embedding.num_embeddings, device=self.position_embedding.weight.device)
        table = self.position_embedding(every)  # through the module: sharded weights are gathered for its call
        return table[:0], table

    def resample(self, table: Tensor, side: int, grid: Grid) -> Tensor:
        """Return the position grid resampled to a frame's, ``(h * w, D)``; at the trained size as it is."""
        if (grid.h, grid.w) == (side, side):
            return table
        mode, antialias = self.own if self.positions == "own" else (self.positions, False)
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2).float()  # 16 bits would shift the embeddings
        resampled = F.interpolate(square, (grid.h, grid.w), mode=mode, align_corners=False, antialias=antialias)
        return resampled.to(table.dtype).flatten(2)[0].T


class _Clip(_PackedEmbeddings):
    class_embedding: Tensor

    def tables(self) -> tuple[Tensor, Tensor]:
        _, table = super().tables()
        return self.class_embedding + table[:1], table[1:]


class _Siglip2(_PackedEmbeddings):
    own = _Own("bilinear", antialias=True)

    def embed(self, patches: Tensor) -> Tensor:
        side = round((patches.shape[1] // 3) ** 0.5)
        return self.patch_embedding(patches.view(-1, 3, side, side).permute(0, 2, 3, 1).flatten(1))


class _Vit(_PackedEmbeddings):
    patch_embeddings: Any
    position_embeddings: Tensor
    cls_token: Tensor

    def embed(self, patches: Tensor) -> Tensor:
        return self._convolve(self.patch_embeddings.projection, patches)

    def tables(self) -> tuple[Tensor, Tensor]:
        table = self.position_embeddings[0]
        return self.cls_token[0] + table[:1], table[1:]


class _Registers(_Vit):
    own = _Own("bicubic", antialias=True)
    register_tokens: Tensor

    def tables(self) -> tuple[Tensor, Tensor]:
        prefix, table = super().tables()
        return torch.cat([prefix, self.register_tokens[0]]), table


_KINDS: dict[str, type[_PackedEmbeddings]] = {
    "siglip_vision_model": _PackedEmbeddings,
    "siglip2_vision_model": _Siglip2,
    "clip_vision_model": _Clip,
    "dinov2": _Vit,
    "dinov2_with_registers": _Registers,
    "vit": _Vit,
}
RAW = "sparsevlm_patches"
"""Model type of the tower without weights."""


def check_native(vision_config: PreTrainedConfig) -> None:
    """Refuse a tower that cannot see pictures in their own shape.

    Raises:
        ValueError: It is none of the known ones.
    """
    kind = vision_config.model_type
    if kind not in (*_KINDS, *QWEN, RAW):
        raise ValueError(
            f"vision tower {kind!r} cannot take pictures at native resolution; those that can are "
            f"{', '.join([*_KINDS, *QWEN, 'sparsevlm:patches'])}. Take one of them, or set model.vision.resize to "
            "stretch, crop or pad"
        )


def rule_faults(native: Any, vision_config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Yield the rules whose sides the tower cannot take, each with the reason."""
    patch, unit = patch_side(vision_config), side_unit(vision_config)
    for name, rule in rules_of(native):
        if rule["multiple"] % unit:
            what = (
                f"whole patches of {patch}" if unit == patch else f"whole squares of {unit // patch} patches of {patch}"
            )
            yield name, f"sides that are multiples of {rule['multiple']} pixels do not hold {what}"


def make_native(tower: Any, positions: str = "own") -> None:
    """Turn a tower into one that takes packed patches inside `encode_native`; its weights and their names stay.

    Args:
        tower: Vision model of transformers, freshly built.
        positions: How its position grid is resampled; see `recipe.native.Native`.

    Raises:
        ValueError: The tower is none of the known ones.
    """
    check_native(tower.config)
    if tower.config.model_type == RAW:
        return
    if tower.config.model_type in QWEN:
        make_packed(tower)
        return
    embeddings = tower.embeddings
    if not isinstance(embeddings, _PackedEmbeddings):
        embeddings.__class__ = _packed_class(_KINDS[tower.config.model_type], type(embeddings))
    embeddings.positions = positions
    tower.set_attn_implementation(ATTENTION)


@cache
def _packed_class(mixin: type, own: type) -> type:
    return type(f"Packed{own.__name__}", (mixin, own), {"__doc__": f"`{own.__name__}` over packed patches."})


def encode_native(tower: Any, patches: Tensor, grids: Sequence[Grid], layer: int | Sequence[int] = -1) -> Tensor:
    """Return the features of the packed patches of many pictures and videos.

    Args:
        tower: What `make_native` made of a tower.
        patches: ``(P, 3 * p * p)`` as `vision.patches` cuts them; cast to the tower's dtype.
        grids: Patch grid of each item; their tokens sum to P. Each frame is seen by itself.
        layer: Hidden layer, or layers whose features are concatenated; as `encoder.encode_frames`.

    Returns:
        ``(P, D)``; prefix tokens are dropped.

    Raises:
        ValueError: No such layer, or grids that do not fit the patches.
    """
    total = sum(grid.num_tokens for grid in grids)
    if patches.ndim != 2 or patches.shape[0] != total:
        raise ValueError(
            f"pixel_values {tuple(patches.shape)} do not hold the {total} patches of grids "
            f"{[str(grid) for grid in grids][:8]}; a tower at native resolution takes (patches, 3 * patch * patch)"
        )
    if tower.config.model_type == RAW:
        return tower(patches).last_hidden_state[0]
    if torch.is_grad_enabled():
        carry_to_recomputation(tower, "which patches belong together", "freeze the tower")
    layers = as_layers(layer)
    if tower.config.model_type in QWEN:
        return _chosen(tower, encode_qwen(tower, patches, grids, layers), layers)
    if tower.config._attn_implementation != ATTENTION:  # set for the whole model since: another would join the frames
        tower.set_attn_implementation(ATTENTION)
    prefix = num_prefix(tower)
    lengths = tuple(prefix + grid.h * grid.w for grid in grids for _ in range(grid.t))
    options: dict[str, Any] = {"output_hidden_states": list(layers), "return_dict": True}
    if tower.config.model_type == "siglip2_vision_model":
        options |= {"pixel_attention_mask": None, "spatial_shapes": None}
    with setting(RUNNING, Pass(tuple(grids), lengths)):
        states = [
            None if state is None else state[0] for state in tower(patches.to(tower.dtype), **options).hidden_states
        ]
    features = _chosen(tower, states, layers)  # (N, D)
    if prefix:
        pieces = features.split([size for length in lengths for size in (prefix, length - prefix)])
        features = torch.cat(pieces[1::2])
    return features


def _chosen(tower: Any, states: Sequence[Tensor | None], layers: Sequence[int]) -> Tensor:
    """Return the hidden states of some layers side by side, ``(N, D)``."""
    wrong = [i for i in layers if not -len(states) <= i < len(states)]
    if wrong:
        raise ValueError(
            f"vision layer {wrong}: {type(tower).__name__} has {len(states)} hidden states "
            f"(0 to {len(states) - 1}, or {-len(states)} to -1)"
        )
    chosen: list[Any] = [states[i] for i in layers]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def num_prefix(tower: Any) -> int:
    """Return how many tokens come before a frame's patches."""
    kind = tower.config.model_type
    if kind == "dinov2_with_registers":
        return 1 + tower.config.num_register_tokens
    return int(_KINDS[kind] is not _PackedEmbeddings and _KINDS[kind] is not _Siglip2)


_DIMS: dict[tuple[str, tuple[int, ...]], int] = {}
"""Widths by config and layers: a pure function's results."""


def native_dim(vision_config: PreTrainedConfig, layer: int | Sequence[int] = -1) -> int:
    """Return the width of a tower's features, from a pass over one patch on the meta device.

    Raises:
        ValueError: No such layer.
    """
    from transformers.initialization import meta_device_safe_creation_ops

    check_native(vision_config)
    layers = as_layers(layer)
    key = (vision_config.to_json_string(use_diff=False), layers)
    if key not in _DIMS:
        with plain_modules(), torch.device("meta"), meta_device_safe_creation_ops(), torch.no_grad():
            tower = build_tower(vision_config).eval()
            make_native(tower)
        patch, least = patch_side(vision_config), side_unit(vision_config) // patch_side(vision_config)
        patches = torch.zeros(least**2, 3 * patch**2, device="meta")
        with torch.no_grad():
            _DIMS[key] = encode_native(tower, patches, [Grid(1, least, least)], layers).shape[1]
    return _DIMS[key]


def patch_side(vision_config: PreTrainedConfig) -> int:
    """Return p of a tower that `check_native` takes.

    Raises:
        ValueError: Its patches are no squares.
    """
    patch = vision_config.patch_size
    sides = {patch} if isinstance(patch, int) else set(patch)
    if len(sides) != 1:
        raise ValueError(f"vision tower {vision_config.model_type!r} has patches of {patch}; squares are needed")
    return sides.pop()


def side_unit(vision_config: PreTrainedConfig) -> int:
    """Return what sides of pictures must be multiples of, in pixels: a patch, or a square of them."""
    return patch_side(vision_config) * getattr(vision_config, "spatial_merge_size", 1)


def native_side(vision_config: PreTrainedConfig) -> int:
    """Return the side in pixels of the square that the tower's position grid is for; of one that has none, any."""
    if vision_config.model_type in QWEN:
        return 16 * side_unit(vision_config)
    side = getattr(vision_config, "image_size", None)
    if side is None:  # NaFlex: a number of patches
        return round(vision_config.num_patches**0.5) * patch_side(vision_config)
    return default_image_size(vision_config)
