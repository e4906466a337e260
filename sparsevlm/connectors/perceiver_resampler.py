"""Perceiver resampler: a fixed number of learned queries that read an item's tokens (Flamingo, Qwen-VL, LLaVA-UHD).

Legend: I items of one size, n features of an item, m latents, D width of the input, C width of the block, A = heads *
head_dim.
"""

from __future__ import annotations

from math import isqrt
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.connectors.base import BlockSpec, map_items
from sparsevlm.connectors.learned import Learned
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens


@CONNECTOR_BLOCKS.register("perceiver_resampler")
class PerceiverResamplerSpec(BlockSpec):
    """Learned queries that read the features of each item by cross-attention: as many tokens whatever its size.

    The defaults are Flamingo's (arXiv:2204.14198, section 3.1 and appendix A.1.1), as OpenFlamingo implements it.
    Qwen-VL's (arXiv:2308.12966) and Monkey's is ``{latents: 256, depth: 1, dim: language, heads: 32, head_dim: 128,
    ff_mult: 0, attend_latents: false, residual: false, positions: sincos, bias: true, project: true,
    latent_std: 0.02}``; LLaVA-UHD's (arXiv:2403.11703) the same with 64 latents. A picture that is cut is resampled
    slice by slice.
    """

    type: Literal["perceiver_resampler"] = "perceiver_resampler"
    """Registered name of the block."""
    latents: int = Field(default=64, ge=1)
    """Learned queries: the tokens that an item (or a frame, see `per`) leaves."""
    depth: int = Field(default=6, ge=1)
    """Layers."""
    dim: Annotated[int, Field(ge=1)] | Literal["input", "language"] = "input"
    """Width of the block and of its output: a number, that of the features (Flamingo) or the language model's
    (Qwen-VL). Another width than the features' adds a projection of them, without bias."""
    heads: int = Field(default=8, ge=1)
    """Attention heads."""
    head_dim: int = Field(default=64, ge=1)
    """Width of a head."""
    ff_mult: int = Field(default=4, ge=0)
    """Width of the feed-forward network after each attention, in widths of the block; 0 leaves it out."""
    attend_latents: bool = True
    """Queries also read the queries: keys and values are the features and, behind them, the latents."""
    residual: bool = True
    """Add what a layer gives to its input. Without it, what a query reads takes its place."""
    positions: Literal["none", "sincos"] = "none"
    """`sincos` adds fixed two-dimensional sine-cosine positions to queries and keys (not to values): the queries' are
    a square grid's, the keys' are those brought to the frame's grid by bicubic interpolation. `latents` must be a
    square and the width divide by 4."""
    time_frames: int = Field(default=0, ge=0)
    """Learned embeddings of the frames of a video (Flamingo trains with 8), added to the features; 0: none. A longer
    video gets them interpolated along time, a shorter one the first ones."""
    per: Literal["item", "frame"] = "item"
    """`item`: the frames of a video are read together and leave one set of tokens; `frame`: one set a frame."""
    bias: bool = False
    """Give the attention's and the feed-forward network's linear layers biases."""
    project: bool = False
    """Multiply the output by a square matrix behind the last norm, begun at random with deviation 1 / sqrt(width)."""
    latent_std: float = Field(default=1.0, gt=0)
    """Deviation that the queries begin with."""

    @model_validator(mode="after")
    def _consistent(self) -> PerceiverResamplerSpec:
        if self.positions == "sincos":
            if isqrt(self.latents) ** 2 != self.latents:
                raise ValueError(
                    f"perceiver_resampler: positions 'sincos' place the queries on a square grid, and {self.latents} "
                    "latents are no square; choose 64, 144 or 256, or positions: none"
                )
            if isinstance(self.dim, int) and self.dim % 4:
                raise ValueError(_indivisible(self.dim))
        if self.time_frames and self.per == "frame":
            raise ValueError(
                "perceiver_resampler: time_frames has no meaning with per 'frame', where frames never meet; set it to "
                "0, or per: item"
            )
        return self

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(1, 1, latents)``, or ``(t, 1, latents)`` where frames are read one by one."""
        return Grid(grid.t if self.per == "frame" else 1, 1, self.latents)

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return the width of the block."""
        return {"input": input_dim, "language": text_dim}.get(str(self.dim)) or int(self.dim)

    def build(self, input_dim: int, text_dim: int) -> PerceiverResamplerBlock:
        """Return the module.

        Raises:
            ValueError: Positions need a width that divides by 4.
        """
        dim = self.output_dim(input_dim, text_dim)
        if self.positions == "sincos" and dim % 4:
            raise ValueError(_indivisible(dim))
        return PerceiverResamplerBlock(self, input_dim, dim)


def _indivisible(dim: int) -> str:
    return f"perceiver_resampler: positions 'sincos' need a width that divides by 4, got {dim}; set dim or positions"


class PerceiverResamplerBlock(nn.Module):
    """Layers of cross-attention and feed-forward, a norm, and where asked a projection.

    *Deviations* from Qwen-VL: query, key and value matrices are three, not stacked in one; they and all other linear
    layers begin as torch's do. Queries of a picture that is not square get the positions of Qwen-VL's square grid, keys
    those of it stretched to the picture's (Qwen-VL knows squares only).
    """

    def __init__(self, spec: PerceiverResamplerSpec, input_dim: int, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.dim = dim
        self.latents = Learned(torch.randn(spec.latents, dim) * spec.latent_std)
        self.frame_embeddings = Learned(torch.randn(spec.time_frames, input_dim)) if spec.time_frames else None
        self.input_projection = nn.Identity() if input_dim == dim else nn.Linear(input_dim, dim, bias=False)
        self.layers = nn.ModuleList(PerceiverLayer(spec, dim) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(dim)
        self.projection = Learned(torch.randn(dim, dim) * dim**-0.5) if spec.project else None

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Resample every item; items of one size are done together."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        return tokens.with_features(map_items(tokens, self.dim, self._resample, self), grids)

    def _resample(self, features: Tensor, grid: Grid, _: list[int]) -> Tensor:
        """Read items of one grid, ``(I, n, D) -> (I, n', C)``."""
        frames = features.unflatten(1, (grid.t, grid.h * grid.w))  # (I, t, h * w, D)
        if self.frame_embeddings is not None:
            frames = frames + frame_rows(self.frame_embeddings(), grid.t)[:, None]
        x = self.input_projection(frames if self.spec.per == "frame" else frames.flatten(1, 2)[:, None])
        sets = x.flatten(0, 1)  # (I or I * t, n, C): what one set of queries reads
        latents = self.latents().expand(len(sets), -1, -1)  # (I, m, C)
        places = key_places = None
        if self.spec.positions == "sincos":
            side = isqrt(self.spec.latents)
            square = sincos_2d(self.dim, side, side, features.device)
            places = square.to(latents.dtype)  # (m, C)
            key_places = resize_positions(square, side, grid.h, grid.w).to(latents.dtype)  # (h * w, C)
            key_places = key_places.repeat(sets.shape[1] // len(key_places), 1)
        for layer in self.layers:
            latents = layer(latents, sets, places, key_places)
        latents = self.norm(latents)
        if self.projection is not None:
            latents = latents @ self.projection()
        return latents.reshape(len(features), -1, self.dim)


class PerceiverLayer(nn.Module):
    """Cross-attention from latents to features (and latents), then a feed-forward network, both on normed inputs."""

    def __init__(self, spec: PerceiverResamplerSpec, dim: int) -> None:
        super().__init__()
        self.heads, self.attend_latents, self.residual = spec.heads, spec.attend_latents, spec.residual
        inner = spec.heads * spec.head_dim
        self.norm_features, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, inner, bias=spec.bias)
        self.k_proj = nn.Linear(dim, inner, bias=spec.bias)
        self.v_proj = nn.Linear(dim, inner, bias=spec.bias)
        self.o_proj = nn.Linear(inner, dim, bias=spec.bias)
        self.feed_forward = _feed_forward(dim, spec.ff_mult * dim, spec.bias) if spec.ff_mult else None

    def forward(self, latents: Tensor, features: Tensor, places: Tensor | None, key_places: Tensor | None) -> Tensor:
        """Return the latents after the layer, ``(I, m, C)``.

        Args:
            latents: ``(I, m, C)``.
            features: ``(I, n, C)``.
            places: Positions of the latents, ``(m, C)``.
            key_places: Positions of the features, ``(n, C)``.
        """
        queries, values = self.norm_latents(latents), self.norm_features(features)
        keys = values if key_places is None else values + key_places
        placed = queries if places is None else queries + places
        if self.attend_latents:
            keys, values = torch.cat([keys, placed], dim=1), torch.cat([values, queries], dim=1)  # (I, n + m, C)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (I, heads, ..., head_dim)
            for x in (self.q_proj(placed), self.k_proj(keys), self.v_proj(values))
        )
        read = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (I, m, C)
        latents = latents + read if self.residual else read
        if self.feed_forward is None:
            return latents
        changed = self.feed_forward(latents)
        return latents + changed if self.residual else changed


def _feed_forward(dim: int, width: int, bias: bool) -> nn.Sequential:
    up, down = nn.Linear(dim, width, bias=bias), nn.Linear(width, dim, bias=bias)
    return nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)


def frame_rows(embeddings: Tensor, frames: int) -> Tensor:
    """Return the embeddings of so many frames, ``(frames, D)``: the first ones, or all of them interpolated."""
    if frames <= len(embeddings):
        return embeddings[:frames]
    rows = embeddings.float().T[None]  # (1, D, known)
    mode, align = ("linear", True) if len(embeddings) > 1 else ("nearest", None)
    return F.interpolate(rows, size=frames, mode=mode, align_corners=align)[0].T.to(embeddings.dtype)


def sincos_2d(dim: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return fixed positions ``(height * width, dim)``, float32: half of the channels say the column, half the row.

    Each half is the sines and the cosines of the place times ``10000 ** -(i / (dim / 4))`` (MAE, arXiv:2111.06377).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))

    def waves(places: Tensor) -> Tensor:
        angles = torch.outer(places.float(), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (places, dim / 2)

    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in (height, width)), indexing="ij")
    return torch.cat([waves(columns.flatten()), waves(rows.flatten())], dim=1)


def resize_positions(places: Tensor, side: int, height: int, width: int) -> Tensor:
    """Bring the positions of a square grid to another by bicubic interpolation, ``(height * width, C)``."""
    if (height, width) == (side, side):
        return places
    square = places.T.reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T
