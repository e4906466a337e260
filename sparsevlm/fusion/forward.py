"""What a fusion has to know of a forward pass, from the inputs of the model.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsevlm.connectors.base import connector_marks, parse_connector
from sparsevlm.fusion.install import fusion_spec
from sparsevlm.fusion.media import SEEN, document_starts, idle_media, remember, remembered, see_media
from sparsevlm.fusion.positions import SHIFT, position_shift, remembered_shift, tell_visual
from sparsevlm.moe.modality import goes_by_modality, telling_apart
from sparsevlm.recipe.fusion import GatedCrossAttentionFusion, VisualExpertFusion
from sparsevlm.recompute import setting
from sparsevlm.vision.tokens import VisualTokens


@contextmanager
def fusing(
    model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    tokens: VisualTokens | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    kwargs: Mapping[str, Any],
) -> Iterator[Callable[[Any], None]]:
    """Tell the fusion's modules that run inside what they need of the forward pass.

    Args:
        model: `SparseVLMModel`.
        input_ids: ``(B, T)``, where there are any.
        inputs_embeds: ``(B, T, H)``.
        tokens: Visual tokens of the pass.
        attention_mask: As for the model.
        position_ids: As for the model.
        cache: Cache that the rows continue, or that the pass fills.
        kwargs: Further inputs; `cu_seq_lens_q` tells the documents of a packed row.

    Yields:
        A function that is called with the cache as it is after the pass, so that it remembers.

    Raises:
        ValueError: Placeholders and media disagree, or a cache does not fit.
    """
    spec = fusion_spec(model.config.fusion)
    padded = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2

    def starts(continued: bool) -> Tensor | None:
        boundaries = kwargs.get("cu_seq_lens_q")
        return document_starts(
            inputs_embeds.shape[:2], inputs_embeds.device, boundaries, position_ids, padded or continued
        )

    if isinstance(spec, GatedCrossAttentionFusion):
        with _seeing(model, spec, input_ids, inputs_embeds, tokens, cache, starts) as keep:
            yield keep
    elif isinstance(spec, VisualExpertFusion) or goes_by_modality(model.config.moe):
        shared = isinstance(spec, VisualExpertFusion) and spec.shared_position
        with _telling(model, shared, input_ids, tokens, cache, starts) as keep:
            yield keep
    else:
        yield lambda _: None


@contextmanager
def _telling(
    model: Any,
    shared: bool,
    input_ids: Tensor | None,
    tokens: VisualTokens | None,
    cache: Any,
    starts: Callable[[bool], Tensor | None],
) -> Iterator[Callable[[Any], None]]:
    """Tell experts by modality which tokens are visual and, where positions are shared, the rotary embedding."""
    if input_ids is None:
        raise ValueError(
            "inputs_embeds do not tell which tokens are visual; give input_ids, or a model without experts"
        )
    marks = connector_marks(parse_connector(model.config.connector))
    visual, shares = tell_visual(model.placeholders(input_ids), tokens, marks)
    shift = None
    if shared:
        known = remembered_shift(cache, len(input_ids))
        shift = position_shift(shares, starts(known is not None), known)

    def keep(after: Any) -> None:
        if after is not None and shift is not None:
            after.sparsevlm_shift = shift[:, -1]

    with telling_apart(model.language_model, visual), setting(SHIFT, shift):
        yield keep


@contextmanager
def _seeing(
    model: Any,
    spec: GatedCrossAttentionFusion,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    tokens: VisualTokens | None,
    cache: Any,
    starts: Callable[[bool], Tensor | None],
) -> Iterator[Callable[[Any], None]]:
    """Tell gated cross-attention which media each token sees."""
    shape, device = inputs_embeds.shape[:2], inputs_embeds.device
    known = remembered(cache, shape[0])
    if input_ids is None:
        placeholders = torch.zeros(shape, dtype=torch.bool, device=device)
    else:
        placeholders = model.placeholders(input_ids)
    if tokens is not None:
        tokens = tokens.with_features(tokens.features.to(device, inputs_embeds.dtype))
    seen, count = see_media(placeholders, tokens, spec.sees, starts(known is not None), known)
    if seen.states is None and model.training and torch.is_grad_enabled():
        nothing = model.encode_nothing(device)
        seen = idle_media(nothing.with_features(nothing.features.to(inputs_embeds.dtype)), shape)

    def keep(after: Any) -> None:
        if after is not None:
            remember(after, seen, count)

    with setting(SEEN, seen):
        yield keep
