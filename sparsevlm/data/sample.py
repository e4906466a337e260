"""The records that every data format turns into, and what the processor makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind

if TYPE_CHECKING:
    from torch import Tensor

    from sparsevlm.data.kept import Kept

IGNORE_INDEX = -100
"""Label of a token that is not a target."""

Role = Literal["system", "user", "assistant"]


class BadSampleError(ValueError):
    """A record that cannot be used. Counted, written to ``skipped.jsonl`` with its reason, and skipped."""


@dataclass(frozen=True)
class Media:
    """One picture, video or list of views, not yet read.

    Attributes:
        kind: What it is.
        source: A path (already confined to its media root), encoded bytes, a PIL image, or a sequence of PIL images /
            ``(H, W, 3)`` uint8 arrays (the frames of a video, the views of a scene).
        fps: Frame rate of in-memory frames; videos on disk carry their own.
        start: Second at which a video clip starts.
        end: Second at which it ends; None means the video's end.
        subtitles: File of what is said in a video (already confined to its media root).
        meta: Anything else that a row says of it; `poses` of views: a matrix a view, as nested tuples.
    """

    kind: MediaKind
    source: Any
    fps: float | None = None
    start: float = 0.0
    end: float | None = None
    subtitles: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Message:
    """One turn: text and media in the order in which they are read."""

    role: Role
    content: tuple[str | Media, ...]

    @property
    def text(self) -> str:
        """The turn's text without its media."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: Turns in order.
        id: Identity within its source.
        source: Name of the data source in the recipe.
        where: Place for messages to people: ``file.json:row 12``.
        meta: Anything a task wants to keep (question kind, reference answers).
    """

    messages: tuple[Message, ...]
    id: str = ""
    source: str = ""
    where: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def media(self) -> Iterator[Media]:
        """Yield the media in reading order."""
        for message in self.messages:
            for part in message.content:
                if isinstance(part, Media):
                    yield part


@dataclass
class Encoded:
    """A sample as the model takes it: T tokens, F frames over all its I visual items.

    Attributes:
        input_ids: ``(T,)`` int64; every visual item is a run of its placeholder id, one for each visual token.
        labels: ``(T,)`` int64; `IGNORE_INDEX` where no target is.
        pixel_values: ``(F, 3, H, W)`` float32, frames of all items in order whose features are not known; None where
            there are none.
        items: Visual items as they come to the tower (``t`` of a grid counts frames), media counted from 0.
        visual_lengths: Visual tokens of each medium after the connector.
        sample_id: ``source/id`` for reports.
        guides: Token ids of the text that each medium is asked about, where the connector looks at it; else empty.
        kept: Features of each medium where they are known, None where pixels are there; empty: none are known.
        keys: Name under which each medium's features are to be kept, empty where they are not; empty: none are.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    items: tuple[ItemShape, ...] = ()
    visual_lengths: tuple[int, ...] = ()
    sample_id: str = ""
    guides: tuple[tuple[int, ...], ...] = ()
    kept: tuple[Kept | None, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Tower grid of each item."""
        return tuple(item.grid for item in self.items)

    @property
    def kinds(self) -> tuple[MediaKind, ...]:
        """Media kind of each item."""
        return tuple(item.kind for item in self.items)

    @property
    def length(self) -> int:
        """Tokens, visual ones included."""
        return self.input_ids.shape[0]

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens."""
        return sum(self.visual_lengths)

    @property
    def num_targets(self) -> int:
        """Tokens with a label; the first token of a sequence is never predicted."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())
