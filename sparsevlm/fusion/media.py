"""Which media each text token sees, for the length of one forward pass, and what a cache remembers of it.

Legend: B rows, T tokens a row, M media, N visual tokens of all media, K visual tokens of a row (the longest), D width
of the visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsevlm.vision.tokens import VisualTokens

Sees = Literal["last", "all"]


@dataclass(frozen=True)
class SeenMedia:
    """Media of a forward pass, from the text's side. Media are numbered within their row, in reading order.

    Attributes:
        states: ``(N, D)`` visual tokens; None where there are none.
        keys: ``(B, K)`` index into `states` of each row's visual tokens.
        medium: ``(B, K)`` number of the medium that each belongs to; -1 for padding, which nobody sees.
        first: ``(B, T)`` number of the first medium that each token sees.
        last: ``(B, T)`` number of the last one; less than `first` where a token sees none.
        projected: Layer -> keys and values, filled in where there are no gradients; a cache carries them on.
    """

    states: Tensor | None
    keys: Tensor
    medium: Tensor
    first: Tensor
    last: Tensor
    projected: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def visible(self, device: torch.device) -> Tensor:
        """Return which visual tokens each token sees, ``(B, T, K)`` bool."""
        medium = self.medium[:, None]
        return ((medium >= self.first[..., None]) & (medium <= self.last[..., None])).to(device)


@dataclass(frozen=True)
class RememberedMedia:
    """What a cache keeps: the media of its rows, and their number ``(B,)``."""

    seen: SeenMedia
    count: Tensor


SEEN: ContextVar[SeenMedia | None] = ContextVar("sparsevlm_seen_media", default=None)


def seen_media() -> SeenMedia | None:
    """Return the media of the forward pass that runs; None where no model of ours runs it."""
    return SEEN.get()


def document_starts(
    shape: torch.Size, device: torch.device, cu_seq_lens: Tensor | None, position_ids: Tensor | None, padded: bool
) -> Tensor | None:
    """Return where documents of packed rows begin, ``(B, T)`` bool; None where a row is one document.

    Args:
        shape: ``(B, T)``.
        device: Where the answer goes.
        cu_seq_lens: ``(D + 1,)`` boundaries of a packed row.
        position_ids: ``(B, T)``; they restart at every document.
        padded: There is an attention mask: rows are documents.

    Raises:
        ValueError: Positions of several axes, and no boundaries.
    """
    if cu_seq_lens is not None:
        starts = torch.zeros(shape, dtype=torch.bool, device=device)
        starts[:, cu_seq_lens[:-1].long().to(device)] = True
        return starts
    if position_ids is None or padded:
        return None
    if position_ids.ndim != 2:
        raise ValueError(
            f"fusion: position_ids of {position_ids.ndim} dimensions do not tell the documents of a row; also give "
            "cu_seq_lens_q for packed rows, or attention_mask (B, T) for padded ones"
        )
    position_ids = position_ids.to(device).expand(shape)
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1  # as transformers tells packed documents apart
    return nn.functional.pad(starts, (1, 0), value=True)


def see_media(
    placeholders: Tensor,
    tokens: VisualTokens | None,
    sees: Sees,
    starts: Tensor | None = None,
    known: RememberedMedia | None = None,
) -> tuple[SeenMedia, Tensor]:
    """Find what each token sees: the media before it in its document, its own placeholder's included.

    Args:
        placeholders: ``(B, T)`` bool, one True a medium; all media in reading order, row after row.
        tokens: Their visual tokens; None where the pass brings none. Placeholders without media, as a generated text
            may hold them, change nothing in a continued text and are refused in a new one.
        sees: The last medium alone, or all.
        starts: Where documents begin, ``(B, T)``; None: rows are documents.
        known: What the cache remembers, where the rows continue others.

    Returns:
        What is seen, and the media of each row so far ``(B,)``.

    Raises:
        ValueError: Placeholders and media disagree.

    Source: OpenFlamingo's `MaskedCrossAttention`.
    """
    device = placeholders.device
    sizes = [] if tokens is None else _medium_sizes(tokens)
    found = int(placeholders.sum()) if tokens is not None or known is None else 0
    if found != len(sizes):
        raise ValueError(
            f"the prompt holds {found} visual placeholders but there are {len(sizes)} media, and each takes one "
            "token here; encode prompts with SparseVLMProcessor"
        )
    new = placeholders.long() if found else torch.zeros_like(placeholders, dtype=torch.long)
    before = known.count.to(device) if known is not None else new.new_zeros(new.shape[0])  # (B,)
    count = before[:, None] + new.cumsum(1)  # (B, T) media up to each token
    start = torch.zeros_like(count)
    if starts is not None:
        start = torch.where(starts, count - new, 0).cummax(1).values
    first = start if sees == "all" else torch.maximum(start, count - 1)
    total = count[:, -1]
    if known is not None and not sizes:
        seen = known.seen
        return SeenMedia(seen.states, seen.keys, seen.medium, first, count - 1, seen.projected), total
    states, keys, medium = _row_keys(new, tokens, sizes, known)
    return SeenMedia(states, keys, medium, first, count - 1), total


def idle_media(tokens: VisualTokens, shape: torch.Size) -> SeenMedia:
    """Return visual tokens that nobody sees: they keep a training batch without media on the same modules."""
    zeros = torch.zeros(shape, dtype=torch.long, device=tokens.features.device)
    return SeenMedia(tokens.features, zeros[:, :1], zeros[:, :1] - 1, zeros, zeros - 1)


def _medium_sizes(tokens: VisualTokens) -> list[int]:
    """Return the visual tokens of each medium."""
    sizes: dict[int, int] = {}
    for medium, length in zip(tokens.media, tokens.lengths, strict=True):
        sizes[medium] = sizes.get(medium, 0) + length
    return list(sizes.values())


def _row_keys(
    new: Tensor, tokens: VisualTokens | None, sizes: Sequence[int], known: RememberedMedia | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return all states, and of each row its visual tokens and their media, padded."""
    rows, device = new.shape[0], new.device
    keys: list[list[int]] = [[] for _ in range(rows)]
    media: list[list[int]] = [[] for _ in range(rows)]
    states = None if tokens is None else tokens.features
    offset = 0
    if known is not None and known.seen.states is not None:
        assert states is not None
        for row, (old_keys, old_media) in enumerate(zip(known.seen.keys.tolist(), known.seen.medium.tolist())):
            keys[row] = [key for key, medium in zip(old_keys, old_media) if medium >= 0]
            media[row] = [medium for medium in old_media if medium >= 0]
        offset = known.seen.states.shape[0]
        states = torch.cat([known.seen.states, states.to(known.seen.states)])
    held = [0] * rows if known is None else known.count.tolist()
    row_of = new.nonzero()[:, 0].tolist()
    for row, (start, end) in zip(row_of, pairwise(accumulate(sizes, initial=offset))):
        keys[row] += range(start, end)
        media[row] += [held[row]] * (end - start)
        held[row] += 1
    width = max(map(len, keys))

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([each + [value] * (width - len(each)) for each in lists], dtype=torch.long, device=device)

    return states, padded(keys, 0), padded(media, -1)


def remembered(cache: Any, rows: int) -> RememberedMedia | None:
    """Return what a cache that holds tokens remembers of their media; None for a fresh one.

    Raises:
        ValueError: It was filled by another model, or holds other rows.
    """
    if cache is None or not cache.get_seq_length():
        return None
    known: RememberedMedia | None = getattr(cache, "sparsevlm_media", None)
    if known is None:
        raise ValueError(
            "fusion: the cache was filled outside this model, or copied in part, so its media are unknown; encode the "
            "prompt again"
        )
    if known.count.shape[0] != rows:
        raise ValueError(
            f"fusion: the cache holds {known.count.shape[0]} rows, the input {rows}; encode the prompts again"
        )
    return known


def remember(cache: Any, seen: SeenMedia, count: Tensor) -> None:
    """Have a cache carry the media of its rows, and each layer's keys and values once they are computed.

    Beams may change places without it: those of one prompt have the same media.
    """
    states = None if seen.states is None else seen.states.detach()
    kept = SeenMedia(states, seen.keys, seen.medium, seen.first[:, -1:], seen.last[:, -1:], seen.projected)
    cache.sparsevlm_media = RememberedMedia(kept, count)
