"""Text between the slices of a picture: tokens of the language model itself (LLaVA-UHD's commas and newlines)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsevlm.model.layout import Piece
from sparsevlm.recipe.tiling import Tiling
from sparsevlm.vision.tokens import ItemShape, MediaKind


class SliceText:
    """Separators of a tiling as token ids.

    Args:
        tokenizer: The language model's.
        tiling: The tiling; None or one without separators puts nothing between slices.

    Raises:
        ValueError: The tokenizer has no token for a separator.
    """

    def __init__(self, tokenizer: Any, tiling: Tiling | None) -> None:
        texts = tiling.separators if tiling is not None else None
        self.ids = None if texts is None else tuple(token_ids(tokenizer, text) for text in texts)

    def pieces(self, items: Sequence[ItemShape]) -> tuple[Piece, ...]:
        """Return what a medium puts into the prompt.

        Args:
            items: Its items after the connector; a slice is followed by a separator.
        """
        if self.ids is None or not any(item.kind is MediaKind.SLICE for item in items):
            return (sum(item.grid.num_tokens for item in items),)
        pieces: list[Piece] = []
        for item in items:
            pieces.append(item.grid.num_tokens)
            if item.kind is MediaKind.SLICE and item.place is not None:
                pieces.append(self.ids[item.place.col == item.place.cols - 1])
        return tuple(pieces)


def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the ids of a text that stands behind something else.

    Alone, a tokenizer may put a word boundary before it: LLaMA's "," is 29892 behind a word and 1919 at the start.

    Raises:
        ValueError: The tokenizer knows it only as unknown.
    """
    ids: list[int] = []
    for anchor in ("a", ")", "\n", ""):
        before = tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
        whole = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        ids = whole[len(before) :] if whole[: len(before)] == before else []
        if ids and tokenizer.unk_token_id not in ids:
            return tuple(ids)
    raise ValueError(
        f"the tokenizer has no token for {text!r}, which this tiling puts between the slices of a picture; "
        "take a language model that has one, or another model.vision.tiling"
    )
