"""The towers of Qwen2-VL and Qwen2.5-VL over packed patches, up to their merger.

They take pictures of any shape by themselves: positions are rotations by row and column, attention stays within a frame
(in most layers of Qwen2.5-VL within windows of it). What is added here is their order of patches, and attention that
does runs of one length together. The merger at their end, which joins 2 x 2 patches for their own language model, is
left out: the connector begins where it would stand.

*Deviations*: each frame of a video is seen as a picture is, shown twice to the convolution over two frames; Qwen gives
it frames in pairs.

Legend: P patches of all items, p side of a patch, m x m patches of a merger's square, h heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from sparsevlm.vision.packed import attend
from sparsevlm.vision.tokens import Grid

QWEN = ("qwen2_vl_vision", "qwen2_5_vl_vision")
"""Model types."""


class _PackedAttention:
    """Mixed into a tower's attention: runs of one length are attended in one call, not one by one."""

    qkv: Any
    proj: Any
    num_heads: int
    scaling: float

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        """Return ``(P, D)`` for ``(P, D)``; `cu_seqlens` bounds the runs."""
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

        q, k, v = self.qkv(hidden_states).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (P, h, d) each
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        lengths = cu_seqlens.diff().tolist()
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, h, P, d) each
        states = attend(q, k, v, lengths, self.scaling)  # (1, P, h, d)
        return self.proj(states[0].flatten(1))


@cache
def _packed_class(own: type) -> type:
    return type(f"Packed{own.__name__}", (_PackedAttention, own), {"__doc__": f"`{own.__name__}` over runs."})


def make_packed(tower: Any) -> None:
    """Turn a tower's attention into one over runs; its weights and their names stay."""
    for block in tower.blocks:
        if not isinstance(block.attn, _PackedAttention):
            block.attn.__class__ = _packed_class(type(block.attn))


def encode(tower: Any, patches: Tensor, grids: Sequence[Grid], layers: Sequence[int]) -> tuple[Tensor | None, ...]:
    """Return the hidden states of packed patches, those of `layers` and None for others.

    Args:
        tower: What `make_packed` made of a tower.
        patches: ``(P, 3 * p * p)``, raster order in each frame.
        grids: Patch grid of each item.
        layers: Hidden states that are wanted.

    Returns:
        ``(P, D)`` each, in the order of `patches`.
    """
    config = tower.config
    m, frames = config.spatial_merge_size, config.temporal_patch_size
    device = patches.device
    sizes: dict[str, Any] = {}
    with torch.device("cpu"):  # arithmetic of sizes: nothing waits for a GPU, and meta tensors have no values
        order = _square_order(grids, m)
        thw = torch.tensor([list(grid) for grid in grids])
        sizes["position_ids"] = get_vision_position_ids(thw, m).to(device)
        sizes["cu_seqlens"] = get_vision_cu_seqlens(thw)
        written = order
        if config.model_type == "qwen2_5_vl_vision":
            windows, sizes["cu_window_seqlens"] = get_vision_window_index(thw, m, config.window_size, config.patch_size)
            sizes["window_index"] = windows.to(device)
            written = order.unflatten(0, (-1, m * m))[windows].flatten()  # which patch each hidden state is of
    colours = patches[order.to(device)].unflatten(1, (3, 1, -1))
    shown = colours.expand(-1, -1, frames, -1).flatten(1)  # channel, time, row, column
    options = {"output_hidden_states": list(layers), "return_dict": True}
    states = tower(shown.to(tower.dtype), grid_thw=thw, **sizes, **options).hidden_states
    back = written.argsort().to(device)
    return tuple(None if state is None else state[back] for state in states)


def _square_order(grids: Sequence[Grid], m: int) -> Tensor:
    """Return which patch of the raster stands where in Qwen's order: squares of m x m after one another."""
    orders, start = [], 0
    for grid in grids:
        if grid.h % m or grid.w % m:
            raise ValueError(
                f"a grid of {grid} patches does not divide into squares of {m} x {m}, which Qwen's tower needs"
            )
        raster = torch.arange(start, start + grid.num_tokens)
        squares = raster.view(grid.t, grid.h // m, m, grid.w // m, m).transpose(2, 3)
        orders.append(squares.flatten())
        start += grid.num_tokens
    return torch.cat(orders)
