"""Which tokens of a forward pass are visual, and the position that the visual tokens of a medium share.

Legend: B rows, T tokens a row, N visual tokens of all media.
"""

from __future__ import annotations

from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.vision.tokens import VisualTokens

SHIFT: ContextVar[Tensor | None] = ContextVar("sparsevlm_position_shift", default=None)
"""``(B, T)`` how far the position of each token lies behind its place in its document. Not carried to recomputations:
positions become rotations before the layers run."""


def tell_visual(placeholders: Tensor, tokens: VisualTokens | None, marks: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Find the tokens that visual experts are for, and those that share a position with the token before.

    Args:
        placeholders: ``(B, T)`` bool.
        tokens: What is in their places, in reading order; None: no media, so placeholders are text.
        marks: A medium's first and its last token are marks of its beginning and end.

    Returns:
        All ``(B, T)`` bool: visual tokens, and those of them that share their position with the token before.

    Raises:
        ValueError: Placeholders and media disagree.

    Source: CogVLM's code (`utils/language.py`): the mark of the beginning is visual and that of the end is text, both
    have positions of their own, and all patches between share one. *Deviations*: text between the tokens of a medium
    (slices, frames with time stamps) ends the sharing.
    """
    none = torch.zeros_like(placeholders)
    if tokens is None:
        return none, none
    lengths = [
        sum(length for _, length in run) for _, run in groupby(zip(tokens.media, tokens.lengths), lambda i: i[0])
    ]
    medium = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))  # (N,)
    if int(placeholders.sum()) != len(medium):
        raise ValueError(
            f"the prompt holds {int(placeholders.sum())} visual placeholders but the media give {len(medium)} visual "
            "tokens; encode prompts with SparseVLMProcessor"
        )
    border = torch.ones(1, dtype=torch.bool)
    change = medium[1:] != medium[:-1]
    first, last = torch.cat([border, change]), torch.cat([change, border])  # (N,)
    if not len(medium):
        return none, none
    expert = ~last if marks[1] else torch.ones_like(last)
    patch = expert & ~first if marks[0] else expert
    visual, number = none.clone(), torch.full_like(placeholders, -1, dtype=torch.long)
    visual[placeholders] = expert.to(none.device)
    number[placeholders] = torch.where(patch, medium, -1).to(none.device)
    shares = none.clone()
    shares[:, 1:] = (number[:, 1:] >= 0) & (number[:, 1:] == number[:, :-1])
    return visual, shares


def position_shift(shares: Tensor, starts: Tensor | None, known: Tensor | None) -> Tensor:
    """Return how far the position of each token lies behind its place in its document, ``(B, T)``.

    Args:
        shares: ``(B, T)`` bool, from `tell_visual`.
        starts: Where documents begin, ``(B, T)``; None: rows are documents.
        known: ``(B,)`` shift of the tokens that the rows continue; None: they begin.
    """
    shift = shares.long().cumsum(1)
    if starts is not None:
        # A document's first token shares with none, so what is counted up to it belongs to those before.
        shift = shift - torch.where(starts, shift, 0).cummax(1).values
    return shift if known is None else shift + known.to(shift)[:, None]


def remembered_shift(cache: Any, rows: int) -> Tensor | None:
    """Return the shift of the tokens that a cache ends with, ``(B,)``; None for a fresh one.

    Raises:
        ValueError: It was filled by another model, or holds other rows.
    """
    if cache is None or not cache.get_seq_length():
        return None
    known: Tensor | None = getattr(cache, "sparsevlm_shift", None)
    if known is None or known.shape[0] != rows:
        found = "was filled outside this model" if known is None else f"holds {known.shape[0]} rows, the input {rows}"
        raise ValueError(f"fusion: the cache {found}, so its tokens' positions are unknown; encode the prompt again")
    return known


def share_positions(rotary: nn.Module) -> None:
    """Give a decoder's rotary embedding the shared positions; masks are made from the plain ones."""
    rotary.register_forward_pre_hook(_shifted, with_kwargs=True)


def _shifted(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    shift = SHIFT.get()
    if shift is None:
        return None
    if "position_ids" in kwargs:
        plain = kwargs["position_ids"]
        return args, {**kwargs, "position_ids": plain - shift.to(plain.device)}
    return (args[0], args[1] - shift.to(args[1].device), *args[2:]), kwargs
