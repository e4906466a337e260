"""Towers that see pictures in their own shape: packed patches of all frames, attention within each.

A ViT of transformers runs as it is, over one row of all patches of a batch. Only two things of it look beyond a token:
its embeddings, which get a subclass that lays the position grid over each picture, and its attention, which goes
through transformers' attention interface and keeps frames apart. What a pass holds travels in a context variable.

The rules are OryxViT's (Liu et al., arXiv:2409.12961; `oryx/model/multimodal_encoder/oryx_vit.py`): the position grid
resampled to each picture's patch grid, block-diagonal attention, all else token by token.

Legend: P patches of all items, p side of a patch, F frames, n tokens a frame (its prefix tokens and patches), N all
tokens, D width, G side of the trained position grid, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.recompute import carried, carry_to_recomputation, setting
from sparsevlm.vision.encoder import as_layers, build_tower, default_image_size, plain_modules
from sparsevlm.vision.tokens import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = "packed_frames"
"""Name under which transformers knows the attention."""


class _Pass(NamedTuple):
    """What goes through the tower: patch grids of the items, and the tokens of each frame."""

    grids: tuple[Grid, ...]
    lengths: tuple[int, ...]


_PASS: ContextVar[_Pass | None] = carried("sparsevlm_native_pass")


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
        running = _PASS.get()
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
    if kind not in _KINDS and kind != RAW:
        raise ValueError(
            f"vision tower {kind!r} cannot take pictures at native resolution; those that can are "
            f"{', '.join([*_KINDS, 'sparsevlm:patches'])}. Take one of them, or set model.vision.resize to stretch, "
            "crop or pad"
        )


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
    prefix = num_prefix(tower)
    lengths = tuple(prefix + grid.h * grid.w for grid in grids for _ in range(grid.t))
    options: dict[str, Any] = {"output_hidden_states": list(layers), "return_dict": True}
    if tower.config.model_type == "siglip2_vision_model":
        options |= {"pixel_attention_mask": None, "spatial_shapes": None}
    with setting(_PASS, _Pass(tuple(grids), lengths)):
        states = tower(patches.to(tower.dtype), **options).hidden_states
    wrong = [i for i in layers if not -len(states) <= i < len(states)]
    if wrong:
        raise ValueError(
            f"vision layer {wrong}: {type(tower).__name__} has {len(states)} hidden states "
            f"(0 to {len(states) - 1}, or {-len(states)} to -1)"
        )
    chosen = [states[i][0] for i in layers]  # (N, D) each
    features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
    if prefix:
        pieces = features.split([size for length in lengths for size in (prefix, length - prefix)])
        features = torch.cat(pieces[1::2])
    return features


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
            patches = torch.zeros(1, 3 * patch_side(vision_config) ** 2)
            _DIMS[key] = encode_native(tower, patches, [Grid(1, 1, 1)], layers).shape[1]
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


def native_side(vision_config: PreTrainedConfig) -> int:
    """Return the side in pixels of the square that the tower's position grid is for."""
    side = getattr(vision_config, "image_size", None)
    if side is None:  # NaFlex: a number of patches
        return round(vision_config.num_patches**0.5) * patch_side(vision_config)
    return default_image_size(vision_config)


def register() -> None:
    """Enter `packed_frames` with transformers' attention and mask interfaces; may be called more than once."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_frames_forward)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _PASS.get() is not None else sdpa_mask(*args, **kwargs)


def packed_frames_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each frame of a native pass; outside of one exactly transformers' `sdpa`.

    Frames of one length that follow each other (a video's) are attended in one call. On GPUs in 16 bits one kernel for
    variable lengths does it all.

    Args:
        module: Attention layer.
        query: ``(1, h, N, d)``.
        key: As `query`.
        value: As `query`.
        attention_mask: None in a native pass.
        scaling: Factor of the scores; default ``d ** -0.5``.
        dropout: Of the attention weights.
        **kwargs: As for transformers' `sdpa_attention_forward`.

    Returns:
        ``(1, N, h, d)`` and None.
    """
    running = _PASS.get()
    if running is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if _has_kernel(query) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *running.lengths], device=query.device).cumsum(0, dtype=torch.int32)
        longest = max(running.lengths)
        flat = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]  # (N, h, d) each
        return varlen_attn(*flat, ends, ends, longest, longest, scale=scaling)[None], None  # type: ignore[index]
    runs = [(length, len(list(group))) for length, group in groupby(running.lengths)]
    sizes = [length * frames for length, frames in runs]
    outputs = []
    for (_, frames), *parts in zip(runs, *(x[0].split(sizes, 1) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (frames, -1)).transpose(0, 1) for part in parts)  # (frames, h, n, d) each
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (frames * n, h, d)
    return torch.cat(outputs)[None], None


def _has_kernel(query: Tensor) -> bool:
    """Tell whether torch's kernel for variable lengths takes these numbers."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


register()  # at import: a config that was set to this attention may come from another process
