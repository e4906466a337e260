"""Encoded samples to a batch: one packed row, or padded rows.

Legend: B rows, T tokens of a row, D documents (samples), I visual items, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsevlm.data.kept import Kept
from sparsevlm.data.sample import IGNORE_INDEX, Encoded
from sparsevlm.vision.tokens import MEDIA_KINDS, NO_PLACE, ItemShape


class Collator:
    """Puts the samples of one or several rows together.

    Packed: all documents one after the other in a single row ``(1, T)``. ``position_ids`` restart at every document
    and ``cu_seq_lens_q/k`` (``(D + 1,)`` int32) with ``max_length_q/k`` mark the boundaries; there is no attention
    mask, which would join the documents again. Padded: ``(B, T)`` right-padded rows, one a document, with
    ``attention_mask``.

    Both: ``input_ids``, ``labels``, and where there are media ``pixel_values`` ``(F, 3, H, W)``, ``image_grid_thw``
    ``(I, 3)``, ``media_kinds`` ``(I,)`` and ``media_owners`` ``(I,)`` (the document of each item; in padded batches
    that is the row); where pictures are cut also ``media_places`` ``(I, 7)``: the medium of each item in the batch, and
    its `Place`; where the connector looks at text ``guide_ids`` and ``guide_mask`` ``(G, L)``, a text a medium, and
    ``media_guides`` ``(I,)``, the text of each item; where features of media are known, what `kept_inputs` says, and no
    pixels of them. The label of a document's first token is ignored: nothing precedes it, and in a packed row the end
    of another document would be trained to predict it.

    A batch without any sample (all of its samples could not be read, or the last step of an epoch has fewer rows)
    holds one padding token and no target, so that every process still takes part in the step.

    Args:
        pad_token_id: Token that fills up padded rows.
        packed: Pack or pad.
    """

    def __init__(self, pad_token_id: int, packed: bool) -> None:
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, rows: Sequence[Sequence[Encoded]]) -> dict[str, Any]:
        """Return the batch of the rows' documents, in order."""
        documents = [document for row in rows for document in row] or [self._filler()]
        return {**(self._pack if self.packed else self._pad)(documents), **_media(documents)}

    def _filler(self) -> Encoded:
        return Encoded(torch.tensor([self.pad_token_id]), torch.tensor([IGNORE_INDEX]))

    def _pack(self, documents: Sequence[Encoded]) -> dict[str, Any]:
        lengths = [document.length for document in documents]
        boundaries = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)  # (D + 1,)
        return {
            "input_ids": torch.cat([document.input_ids for document in documents])[None],  # (1, T)
            "labels": torch.cat([_targets(document) for document in documents])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    def _pad(self, documents: Sequence[Encoded]) -> dict[str, Any]:
        shape = len(documents), max(document.length for document in documents)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),  # (B, T)
            "labels": torch.full(shape, IGNORE_INDEX),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for i, document in enumerate(documents):
            batch["input_ids"][i, : document.length] = document.input_ids
            batch["labels"][i, : document.length] = _targets(document)
            batch["attention_mask"][i, : document.length] = 1
        return batch


def _targets(document: Encoded) -> Tensor:
    labels = document.labels.clone()  # (T,)
    labels[0] = IGNORE_INDEX
    return labels


def _media(documents: Sequence[Encoded]) -> dict[str, Tensor]:
    items = [document.items for document in documents]
    if not any(items):
        return {}
    pixels = [document.pixel_values for document in documents if document.pixel_values is not None]
    inputs = kept_inputs(items, [document.kept for document in documents])
    towers = inputs["feature_towers"].tolist() if inputs else [0] * sum(map(len, items))
    grids = [item.grid for item, tower in zip((i for document in items for i in document), towers) if not tower]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
        rows = sum(grid.t if pixels[0].ndim == 4 else grid.num_tokens for grid in grids)  # frames, or patches
        assert inputs["pixel_values"].shape[0] == rows, "pixels and tower grids disagree"
    assert bool(pixels) == bool(grids), "an item has neither pixels nor features"
    return inputs | describe_items(items, [document.guides for document in documents])


def kept_inputs(documents: Sequence[Sequence[ItemShape]], kept: Sequence[Sequence[Kept | None]]) -> dict[str, Tensor]:
    """Return what a batch says of features that were computed before; nothing where there are none.

    Args:
        documents: Items of each document.
        kept: Of each document, the features of each medium.

    Returns:
        ``visual_features`` ``(M, D)``, those of all items that have them, in order, and ``feature_towers`` ``(I,)``,
        the number of the tower that gave an item's, 0 where pixels are there.

    Raises:
        ValueError: They are of different widths.
    """
    of = [each[item.medium] if each else None for items, each in zip(documents, kept, strict=True) for item in items]
    if not any(of):
        return {}
    media = [known.features for each in kept for known in each if known is not None]
    if len({features.shape[1] for features in media}) > 1:
        raise ValueError(
            f"features of {len(media)} media have widths {sorted({features.shape[1] for features in media})}: they are "
            "of different towers; make them anew with `sparsevlm features`"
        )
    towers = torch.tensor([0 if known is None else known.tower for known in of])
    features = media[0] if len(media) == 1 else torch.cat(media)  # a film's may fill half the memory
    return {"visual_features": features, "feature_towers": towers}


def describe_items(
    documents: Sequence[Sequence[ItemShape]], guides: Sequence[Sequence[Sequence[int]]] = ()
) -> dict[str, Tensor]:
    """Return what a batch says of its visual items, the documents one after the other; see `Collator`.

    Args:
        documents: Items of each document.
        guides: Of each document, token ids of each medium's text; nothing where there are no text-guided blocks.
    """
    items = [(owner, item) for owner, document in enumerate(documents) for item in document]
    described = {
        "image_grid_thw": torch.tensor([tuple(item.grid) for _, item in items], dtype=torch.long),  # (I, 3)
        "media_kinds": torch.tensor([MEDIA_KINDS.index(item.kind) for _, item in items]),  # (I,)
        "media_owners": torch.tensor([owner for owner, _ in items]),  # (I,)
    }
    if any(item.place is not None for _, item in items):
        media = {key: i for i, key in enumerate(dict.fromkeys((owner, item.medium) for owner, item in items))}
        places = [(media[owner, item.medium], *(item.place or NO_PLACE)) for owner, item in items]
        described["media_places"] = torch.tensor(places)  # (I, 7)
    texts = {(owner, medium): ids for owner, own in enumerate(guides) for medium, ids in enumerate(own)}
    if texts:
        longest = max(1, *map(len, texts.values()))
        numbers = {key: number for number, key in enumerate(texts)}
        described["guide_ids"] = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts.values()])  # (G, L)
        described["guide_mask"] = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in texts.values()])
        described["media_guides"] = torch.tensor([numbers[owner, item.medium] for owner, item in items])  # (I,)
    return described
