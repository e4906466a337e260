"""The modality of each sample, from the inputs of a model.

Legend: B rows, T tokens a row, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.adapters.mma.context import IMAGE, VIDEO, given_modality

_REMEDY = "say it: with sparsevlm.adapters.mma.use_modality(ids), ids (B,) or (B, T), 0 text, 1 image"


def sample_modality(module: nn.Module, inputs: Mapping[str, Any], modalities: int, text_only: bool) -> Tensor:
    """Return the modality of the sample that each token belongs to, ``(B, T)``.

    A sample is a document of a packed row, else a row. It has the modality of its visual placeholders, or text.

    Args:
        module: Model that the inputs are for; its config names the placeholders.
        inputs: By name.
        modalities: M.
        text_only: The model has no vision tower.

    Raises:
        ValueError: The inputs do not tell, or what was given does not fit them.
    """
    input_ids = inputs.get("input_ids")
    tokens = input_ids if input_ids is not None else inputs.get("inputs_embeds")
    if tokens is None:
        raise ValueError(f"mma: {type(module).__name__} got no input_ids; {_REMEDY}")
    shape = tokens.shape[:2]
    given = given_modality()
    if given is not None:
        return _checked(given.to(tokens.device), shape, modalities)
    config = getattr(module, "config", None)
    names = {IMAGE: ("image_token_id", "image_token_index"), VIDEO: ("video_token_id", "video_token_index")}
    found = {
        kind: [getattr(config, name) for name in each if getattr(config, name, None) is not None]
        for kind, each in names.items()
    }
    if input_ids is None or not (text_only or found[IMAGE]):
        why = "inputs_embeds instead of input_ids" if input_ids is None else "a config that names no image_token_id"
        raise ValueError(f"mma: the modality of the samples cannot be told from {why}; {_REMEDY}")
    visual = torch.zeros_like(input_ids, dtype=torch.long)
    for kind, ids in found.items():
        for token in ids:
            visual = torch.where(input_ids == token, min(kind, modalities - 1), visual)
    documents = document_index(inputs, shape, visual.device)
    if documents is None:
        return visual.amax(1, keepdim=True).expand(shape)
    return torch.zeros_like(visual).scatter_reduce(1, documents, visual, "amax").gather(1, documents)


def document_index(inputs: Mapping[str, Any], shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return the document of each token in its row, ``(B, T)``; None where a row is one document.

    Raises:
        ValueError: Positions of several axes, and nothing else that tells the documents.
    """
    boundaries = inputs.get("cu_seq_lens_q")
    if boundaries is not None:
        positions = torch.arange(shape[1], device=device)
        return torch.bucketize(positions, boundaries.to(device)[1:].long(), right=True).expand(shape)
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if position_ids is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return None
    if position_ids.ndim != 2:
        raise ValueError(
            f"mma: position_ids of {position_ids.ndim} dimensions do not tell the documents of a row; also give "
            "cu_seq_lens_q for packed rows, or attention_mask (B, T) for padded ones"
        )
    position_ids = position_ids.to(device).expand(shape)
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1  # as transformers tells packed documents apart
    return nn.functional.pad(starts.long().cumsum(1), (1, 0))


def _checked(ids: Tensor, shape: torch.Size, modalities: int) -> Tensor:
    """Return given modalities for each token."""
    fits = ids.shape == shape or (ids.ndim == 1 and ids.shape[0] == shape[0])
    if not fits or int(ids.min()) < 0 or int(ids.max()) >= modalities:
        raise ValueError(
            f"mma: use_modality got ids of shape {tuple(ids.shape)} from {ids.unique().tolist()}; expected "
            f"({shape[0]},) or {tuple(shape)} with values 0 to {modalities - 1}"
        )
    return (ids if ids.ndim == 2 else ids[:, None]).long().expand(shape)
