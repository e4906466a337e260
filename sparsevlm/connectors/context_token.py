"""LLaMA-VID: of each frame one token that the question asks for, and few that it does not.

Legend: I items of one size, t frames of each, B of all; a frame has p tokens before its n patches, m queries read it, c
tokens are its content; D width of the features, H language width.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.connectors.base import BlockSpec, GuideText, map_items
from sparsevlm.connectors.qformer import QFormerBlock, QFormerSpec, guides_of
from sparsevlm.connectors.sharded import most_calls
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

Content = Literal["mean", "grid", "all"]
"""How the patches of a frame become its content."""

FRAMES = 64
"""Frames that are read at once: where no gradient is kept, an hour of them needs the memory of so many."""


@CONNECTOR_BLOCKS.register("context_token")
class ContextTokenSpec(BlockSpec):
    """A context token and content tokens of each frame (LLaMA-VID, Li et al., arXiv:2311.17043, section 3.2).

    A Q-Former reads the frame with the question; its queries attend to the patches, and the mean of what they find is
    the context token. The content is the patches, pooled as `content` says, through a two-layer MLP. Both end at the
    language model's width.

    With `model.vision.select: full` the Q-Former also sees the tower's class token, as published; say so in `prefix`.
    *Deviation*: LLaMA-VID puts the frames into the prompt once for each turn of the user, with that turn's context;
    here they stand where the conversation has them, with the context of the turn that they stand in.
    """

    type: Literal["context_token"] = "context_token"
    """Registered name of the block."""
    content: Content = "mean"
    """`mean`: one token, the mean of the patches (LLaMA-VID's videos: two tokens a frame); `grid`: means over the
    cells of a grid; `all`: every patch (its images)."""
    grid: int = Field(default=2, ge=1)
    """Side of the grid in cells, where the content is `grid`; must divide the frame's sides."""
    picture_content: Content | None = None
    """The same for pictures; default: as `content`."""
    prefix: int = Field(default=0, ge=0)
    """Tokens before the patches of a frame (a class token is 1), which only the Q-Former sees."""
    qformer: QFormerSpec = QFormerSpec(instruction=True, max_text=256)
    """The Q-Former, with the options of `qformer`; here `instruction` is on and `max_text` 256 by default."""

    @field_validator("qformer", mode="before")
    @classmethod
    def _asked(cls, raw: Any) -> Any:
        return {"instruction": True, "max_text": 256, **raw} if isinstance(raw, dict) else raw

    @property
    def guide(self) -> GuideText | None:
        """Return the Q-Former's."""
        return self.qformer.guide

    def content_of(self, kind: MediaKind) -> Content:
        """Return how the content of items of a kind is made."""
        pictures = kind in (MediaKind.IMAGE, MediaKind.SLICE)
        return self.picture_content or self.content if pictures else self.content

    def patches(self, grid: Grid) -> tuple[int, int]:
        """Return height and width of a frame's patches.

        Raises:
            ValueError: They are no square behind `prefix` others.
        """
        h, w = grid.h, grid.w
        if self.prefix:
            h = w = isqrt(max(grid.h * grid.w - self.prefix, 0))
            if h == 0 or h * w + self.prefix != grid.h * grid.w:
                raise ValueError(
                    f"context_token: a frame of {grid.h} x {grid.w} tokens is no square of patches behind "
                    f"{self.prefix} other(s); set prefix to the tower's tokens before the grid with "
                    "model.vision.select full, and to 0 with patch"
                )
        return h, w

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, 1, 1 + content tokens)``.

        Raises:
            ValueError: See `patches`; or `grid` does not divide them.
        """
        h, w = self.patches(grid)
        content = self.content_of(kind)
        if content == "grid" and (h % self.grid or w % self.grid):
            raise ValueError(
                f"context_token: {self.grid} x {self.grid} cells do not divide a frame of {h} x {w} patches; choose "
                "another grid"
            )
        return Grid(grid.t, 1, 1 + {"mean": 1, "grid": self.grid**2, "all": h * w}[content])

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return the language model's width."""
        return text_dim

    def build(self, input_dim: int, text_dim: int) -> ContextTokenBlock:
        """Return the module.

        Raises:
            ValueError: The Q-Former does not look at text.
        """
        if not self.qformer.instruction:
            raise ValueError("context_token: its qformer must look at the question; leave qformer.instruction on")
        return ContextTokenBlock(self, input_dim, text_dim)

    def load_pretrained(self, module: nn.Module) -> None:
        """Read the Q-Former's `weights`."""
        assert isinstance(module, ContextTokenBlock)
        self.qformer.load_pretrained(module.qformer)


class ContextTokenBlock(nn.Module):
    """Q-Former, attention of its queries to the patches, and the projector of the content."""

    def __init__(self, spec: ContextTokenSpec, input_dim: int, text_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.text_dim = text_dim
        self.qformer = QFormerBlock(spec.qformer, input_dim)
        self.query_projection = nn.Linear(spec.qformer.dim, input_dim)
        self.key_projection = nn.Linear(input_dim, input_dim)
        self.value_projection = nn.Linear(input_dim, text_dim)
        self.projector = nn.Sequential(nn.Linear(input_dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim))

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Make the tokens of every frame, context first."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]

        def make(features: Tensor, grid: Grid, items: list[int]) -> list[Tensor]:
            h, w = self.spec.patches(grid)
            frames = features.unflatten(1, (grid.t, -1))  # (I, t, p + n, D)
            contexts = self._contexts(frames.flatten(0, 1), guides_of(tokens.guides, items, grid.t))  # (I * t, H)
            kinds = [self.spec.content_of(tokens.kinds[item]) for item in items]
            pooled = [self._pool(x[:, self.spec.prefix :], h, w, kind) for x, kind in zip(frames, kinds)]  # (t, c, D)
            contents = self.projector(torch.cat([x.flatten(0, 1) for x in pooled]))
            contents = contents.split([x.shape[0] * x.shape[1] for x in pooled])  # (t * c, H)
            return [
                torch.cat([context[:, None], content.unflatten(0, (grid.t, -1))], dim=1).flatten(0, 1)
                for context, content in zip(contexts.split(grid.t), contents)
            ]

        return tokens.with_features(map_items(tokens, self.text_dim, make, self), grids)

    def _contexts(self, frames: Tensor, guides: tuple[Tensor, Tensor]) -> Tensor:
        """Return the context tokens ``(B, H)`` of frames ``(B, p + n, D)``, `FRAMES` at a time."""
        parts = list(zip(*(each.split(FRAMES) for each in (frames, *guides))))
        idle = most_calls(len(parts), self, frames.device) - len(parts)
        contexts = torch.cat([self._context(some, ids, mask) for some, ids, mask in parts])
        for _ in range(idle):
            contexts = contexts + 0.0 * self._context(*(each[:1] for each in parts[0])).sum()
        return contexts

    def _context(self, frames: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the same; the values of the attention are the patches themselves."""
        queries = self.query_projection(self.qformer.read(frames, (ids, mask)))  # (B, m, D)
        patches = frames[:, self.spec.prefix :]  # (B, n, D)
        scores = queries @ self.key_projection(patches).mT * patches.shape[-1] ** -0.5
        return self.value_projection((scores.softmax(dim=-1) @ patches).mean(dim=1))

    def _pool(self, patches: Tensor, height: int, width: int, content: Content) -> Tensor:
        """Return the content before its projector, ``(t, c, D)``."""
        if content == "all":
            return patches
        if content == "mean":
            return patches.mean(dim=1, keepdim=True)
        maps = patches.mT.unflatten(2, (height, width))  # (t, D, h, w)
        cells = F.avg_pool2d(maps, (height // self.spec.grid, width // self.spec.grid))
        return cells.flatten(2).mT
