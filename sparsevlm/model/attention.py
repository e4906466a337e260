"""`packed_sdpa`: causal attention over packed rows, one document at a time, for any transformers decoder.

Legend: B rows, T tokens, D documents in a row, h heads, d head width.

transformers tells packed rows from `position_ids` that restart (with no attention mask and no cache) and builds a
``(B, 1, T, T)`` mask for `sdpa`: attention over a packed row then costs T squared whatever its documents' lengths, and
no fused kernel applies. Here the mask function answers with the documents' boundaries instead of a mask. They travel
the mask's way, as an integer tensor ``(1, 1, 1, D + 1)`` in host memory, through every decoder that hands its mask on
and through recomputation under gradient checkpointing, and the attention function runs `sdpa` document by document.
In every other case (padding, KV cache, patterns that are more than causal) both functions are `sdpa`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

PACKED_SDPA = "packed_sdpa"
"""Name under which transformers knows the pair of functions."""

SHORT = 64
"""Tokens up to which documents are padded and attended together on CPUs in 16 bits."""


def register() -> None:
    """Enter `packed_sdpa` with transformers' attention and mask interfaces; may be called more than once."""
    AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
    AttentionMaskInterface.register(PACKED_SDPA, packed_sdpa_mask)


def supports_packed_sdpa(model: Any) -> bool:
    """Tell whether a transformers model, or its class, takes its attention from the interface (older ones do not).

    That it can be set does not say that documents stay apart: see `isolates_documents`.
    """
    supported = getattr(model, "_can_set_attn_implementation", None)
    return supported is not None and bool(supported()) and bool(getattr(model, "_supports_sdpa", False))


@torch.no_grad()
def isolates_documents(language_model: Any) -> bool:
    """Probe whether a decoder keeps two packed documents apart and restarts their positions.

    Needed for decoders at large: one that builds an attention mask of ones where it gets none (OPT with `sdpa`) lets
    documents of a packed row see each other without a word.

    Args:
        language_model: Decoder without head, with any attention implementation, unsharded. Runs nine tokens.
    """
    device = language_model.get_input_embeddings().weight.device
    vocabulary = language_model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(6, device=device)[None] * 7 + 3) % vocabulary  # (1, 6): two documents of 3
    positions = torch.arange(3, device=device).repeat(2)[None]
    boundaries = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    was_training = language_model.training
    language_model.eval()
    packed = language_model(
        ids,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=3,
        max_length_k=3,
    ).last_hidden_state[:, 3:]
    alone = language_model(ids[:, 3:], use_cache=False).last_hidden_state
    language_model.train(was_training)
    tolerance = 1e-5 if alone.dtype == torch.float32 else 0.02
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max())


def boundaries_mask(boundaries: Sequence[int] | Tensor) -> Tensor:
    """Return documents' boundaries ``0 … T`` (D + 1 numbers, cumulative lengths) in the form that stands for a mask."""
    return torch.as_tensor(boundaries, dtype=torch.int32, device="cpu")[None, None, None]  # (1, 1, 1, D + 1)


def packed_sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return what stands for the mask of a row: boundaries for a packed row, else exactly what `sdpa` would use.

    Args:
        batch_size: B.
        q_length: Query tokens.
        kv_length: Key tokens, cached ones included.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: ``(row, head, query, key) -> bool``, on broadcasting index tensors.
        attention_mask: ``(B, kv_length)`` padding mask.
        local_size: Sliding window or chunk, where the layer has one.
        allow_is_causal_skip: False where transformers found the row packed (or a pattern beyond causal).
        use_vmap: The caller gave its own mask function.
        device: Where a mask is put.
        **kwargs: Passed to `sdpa_mask`.

    Returns:
        ``(1, 1, 1, D + 1)`` int32 boundaries, a ``(B, 1, q, kv)`` bool mask, or None for plain causal attention.
    """
    may_be_packed = (
        batch_size == 1
        and q_length == kv_length > 1
        and isinstance(q_offset, int)
        and q_offset == kv_offset == 0
        and attention_mask is None
        and not allow_is_causal_skip
        and not use_vmap
    )
    if may_be_packed:
        boundaries = _causal_documents(mask_function, q_length, device)
        # A window is moot where no document is longer than it; a longer one needs the whole mask.
        if boundaries is not None and (local_size is None or _longest(boundaries) <= local_size):
            return boundaries_mask(boundaries)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def packed_sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each document of a packed row; without boundaries, exactly transformers' `sdpa`.

    Boundaries come as the mask (see `packed_sdpa_mask`) or, where there is no mask at all, from `cu_seq_lens_q`. A
    mask that was built (a sliding window shorter than a document) is used as it is, if it keeps the documents apart.

    Args:
        module: Attention layer.
        query: ``(B, h, T, d)``.
        key: ``(B, key-value heads, T, d)``.
        value: As `key`.
        attention_mask: Boundaries, a bool or additive mask, or None.
        cu_seq_lens_q: ``(D + 1,)`` boundaries, as flash attention takes them.
        **kwargs: As for `sdpa_attention_forward` (`dropout`, `scaling`, …).

    Returns:
        ``(B, T, h, d)`` and None.

    Raises:
        ValueError: Boundaries that do not end at the row's end, more than one row, or a mask that joins documents.
    """
    boundaries = None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        boundaries = attention_mask.flatten().tolist()
    elif attention_mask is None and cu_seq_lens_q is not None and query.shape[2] == key.shape[2]:
        boundaries = cu_seq_lens_q.tolist()
    if boundaries is None:
        if attention_mask is not None and cu_seq_lens_q is not None:
            _check_apart(attention_mask, cu_seq_lens_q)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    tokens = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != tokens or boundaries[0] != 0 or boundaries[-1] != tokens:
        raise ValueError(
            f"packed_sdpa: boundaries {boundaries[:8]}… must run from 0 to the end of one row; got {query.shape[0]} "
            f"rows of {tokens} queries and {key.shape[2]} keys"
        )
    lengths = [end - start for start, end in pairwise(boundaries)]
    kwargs["is_causal"] = True
    if len(lengths) > 1 and max(lengths) <= SHORT and query.device.type == "cpu" and query.dtype != torch.float32:
        return _attend_padded(module, query, key, value, lengths, **kwargs), None
    outputs = [
        sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]  # (1, n, h, d)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2))
    ]
    return torch.cat(outputs, dim=1), None  # (1, T, h, d)


def _attend_padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **kwargs: Any
) -> Tensor:
    """Attend within many short documents at once: ``(1, h, T, d)`` to ``(1, T, h, d)``.

    Documents are padded at their end, so causal attention needs no mask to keep the padding out. The CPU's fused kernel
    is slow backwards in 16 bits on short documents: 16 of 50 tokens take 43 ms one by one and 16 ms like this.
    """
    longest = max(lengths)
    starts = torch.tensor([0, *accumulate(lengths[:-1])], device=query.device)[:, None]
    steps = torch.arange(longest, device=query.device)[None]
    ends = torch.tensor(lengths, device=query.device)[:, None]
    gather = (starts + steps.clamp(max=ends - 1)).flatten()  # (D * longest,) padding repeats the last token
    keep = (steps < ends).flatten().nonzero().flatten()  # (T,)
    q, k, v = (
        x[0].transpose(0, 1).index_select(0, gather).unflatten(0, (len(lengths), longest)).transpose(1, 2)
        for x in (query, key, value)
    )  # (D, h, longest, d) each
    with sdpa_kernel(SDPBackend.MATH):
        output = sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]  # (D, longest, h, d)
    return output.flatten(0, 1).index_select(0, keep)[None]


def _causal_documents(mask_function: Callable[..., Any], length: int, device: torch.device | str) -> list[int] | None:
    """Return the boundaries of the documents that a mask keeps apart; None if it is more than causal, or keeps none.

    Two diagonals tell: a token sees its predecessor unless a document starts with it, and never its successor.
    """
    index = torch.arange(length, device=device)
    earlier, later = index[None, None, :-1, None], index[None, None, 1:, None]  # (1, 1, T - 1, 1) each
    zero = index[:1, None, None, None]
    sees_previous = mask_function(zero, zero, later, earlier).expand(1, 1, length - 1, 1)
    sees_next = mask_function(zero, zero, earlier, later).expand(1, 1, length - 1, 1)
    starts = (torch.nonzero(~sees_previous.flatten()).flatten() + 1).tolist()
    if not starts or bool(sees_next.any()):
        return None
    return [0, *starts, length]


def _check_apart(attention_mask: Tensor, cu_seq_lens: Tensor) -> None:
    """Refuse a mask by which the first token of a document sees the last of the one before."""
    starts = cu_seq_lens[1:-1].long().to(attention_mask.device)
    seen = attention_mask[:, :, starts, starts - 1]  # (B, h | 1, D - 1)
    if bool((seen if seen.dtype == torch.bool else seen >= 0).any()):
        raise ValueError(
            "packed_sdpa: the mask lets documents of a packed row see each other; pass use_cache=False and no "
            "attention_mask, so that transformers finds the documents in position_ids"
        )


def _longest(boundaries: Sequence[int]) -> int:
    """Return the length of the longest document."""
    return max(end - start for start, end in pairwise(boundaries))
