"""Attention over one row of tokens of many frames, each of which sees itself only.

What a pass holds travels in a context variable, so that layers and their recomputation know it.

Legend: N tokens of all frames, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.recompute import carried
from sparsevlm.vision.tokens import Grid

ATTENTION = "packed_frames"
"""Name under which transformers knows the attention."""


class Pass(NamedTuple):
    """What goes through the tower: patch grids of the items, and the tokens of each frame."""

    grids: tuple[Grid, ...]
    lengths: tuple[int, ...]


RUNNING: ContextVar[Pass | None] = carried("sparsevlm_native_pass")


def register() -> None:
    """Enter `packed_frames` with transformers' attention and mask interfaces; may be called more than once."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_frames_forward)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if RUNNING.get() is not None else sdpa_mask(*args, **kwargs)


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
    running = RUNNING.get()
    if running is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return attend(query, key, value, running.lengths, scaling, dropout), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within runs of tokens.

    Args:
        query: ``(1, h, N, d)``.
        key: As `query`.
        value: As `query`.
        lengths: Tokens of each run; they sum to N.
        scaling: Factor of the scores; default ``d ** -0.5``.
        dropout: Of the attention weights.

    Returns:
        ``(1, N, h, d)``.
    """
    if _has_kernel(query) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
        longest = max(lengths)
        flat = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]  # (N, h, d) each
        return varlen_attn(*flat, ends, ends, longest, longest, scale=scaling)[None]  # type: ignore[index]
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    sizes = [length * frames for length, frames in runs]
    outputs = []
    for (_, frames), *parts in zip(runs, *(x[0].split(sizes, 1) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (frames, -1)).transpose(0, 1) for part in parts)  # (frames, h, n, d) each
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (frames * n, h, d)
    return torch.cat(outputs)[None]


def _has_kernel(query: Tensor) -> bool:
    """Tell whether torch's kernel for variable lengths takes these numbers."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


register()  # at import: a config that was set to this attention may come from another process
