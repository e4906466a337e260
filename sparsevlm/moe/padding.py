"""Which tokens of a forward pass are real: padding is not routed.

The mask is a property of one forward pass, so it lives in a context variable for that long (see `recompute`).

Legend: B rows, T tokens a row, S = B * T, n real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.moe.groups import Settings
from sparsevlm.recompute import carried, carry_to_recomputation, setting


@dataclass(frozen=True)
class RealTokens:
    """The tokens that are no padding, in reading order.

    Attributes:
        mask: ``(S,)`` bool.
        index: ``(n,)`` their positions.
    """

    mask: Tensor
    index: Tensor


_REAL: ContextVar[RealTokens | None] = carried("sparsevlm_real_tokens")


def real_tokens(num_tokens: int) -> RealTokens | None:
    """Return the real tokens of the forward pass that runs, None where all are real.

    Args:
        num_tokens: S, as the caller sees it.
    """
    real = _REAL.get()
    assert real is None or real.mask.numel() == num_tokens, f"mask of {real.mask.numel()} for {num_tokens} tokens"
    return real


def padding_mask(attention_mask: Any, groups: Mapping[str, Settings], training: bool, num_tokens: int) -> Tensor | None:
    """Return what of an attention mask tells padding from tokens.

    Args:
        attention_mask: ``(B, past + T)``; or a mask of pairs, ready for the attention, which does not tell.
        groups: Groups of routers, see `sparsevlm.moe.groups`.
        training: Which capacity counts.
        num_tokens: T. With a cache, the mask also covers the tokens before.

    Returns:
        ``(B, T)``, None where there is none, or nobody to ask. Without capacity, padding that is routed changes no
        token's output.

    Raises:
        ValueError: With a capacity, padding of an unknown place could turn tokens away.
    """
    if attention_mask is None or not groups:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -num_tokens:]
    name = "capacity_factor" if training else "eval_capacity_factor"
    limits = [settings[name] for settings in groups.values() if settings.get(name) is not None]
    if limits:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"{name} is {limits[0]}, so the routers must know which tokens are padding: give attention_mask as "
            f"(rows, tokens), got {got} (a static cache makes such masks; use the dynamic one)"
        )
    return None


@contextmanager
def leave_out_padding(language_model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Tell the MoE blocks that run inside, and their recomputations, which tokens are real.

    Args:
        language_model: The decoder that is called inside.
        mask: ``(B, T)``, 0 for padding; None where there is none.

    Raises:
        ValueError: The decoder's recomputations cannot be told.
    """
    real = None
    if mask is not None:
        flat = mask.reshape(-1).bool()  # (S,)
        index = flat.nonzero().squeeze(-1)  # (n,)
        if index.numel() < flat.numel():
            real = RealTokens(flat, index)
            if language_model.training and torch.is_grad_enabled():
                carry_to_recomputation(language_model, "which tokens are padding", "pack the rows (packing: true)")
    with setting(_REAL, real):
        yield
