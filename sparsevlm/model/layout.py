"""Token layout of one conversation: targets from character spans, placeholders expanded, cuts between visual blocks.

Pure functions on lists; the processor feeds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError
from sparsevlm.vision.tokens import ItemShape, MediaKind

Piece = int | tuple[int, ...]
"""What a medium puts into the prompt: so many visual tokens, or text tokens between them."""


@dataclass(frozen=True)
class Medium:
    """What stands for one placeholder of a prompt.

    Attributes:
        kind: Media kind.
        shapes: Its items as they come to the tower, before the connector.
        placeholder: Token id that is repeated for each visual token.
        pieces: Visual tokens, after the connector, and the text between them; one where they stay beside the text.
        guide: Token ids of the text that it is asked about, where the connector looks at it.
        beside: Visual tokens that stay beside the text; None where they are in it.
    """

    kind: MediaKind
    shapes: tuple[ItemShape, ...]
    placeholder: int
    pieces: tuple[Piece, ...]
    guide: tuple[int, ...] | None = None
    beside: int | None = None

    @property
    def num_tokens(self) -> int:
        """Placeholders in the prompt."""
        return sum(piece for piece in self.pieces if isinstance(piece, int))

    @property
    def num_visual(self) -> int:
        """Visual tokens, in the prompt or beside it."""
        return self.num_tokens if self.beside is None else self.beside

    @property
    def length(self) -> int:
        """Tokens in the prompt."""
        return sum(piece if isinstance(piece, int) else len(piece) for piece in self.pieces)

    @property
    def num_frames(self) -> int:
        """Frames that go to the tower."""
        return sum(shape.grid.t for shape in self.shapes)


@dataclass
class Tokens:
    """A tokenised conversation.

    Attributes:
        ids: Token ids, placeholders expanded.
        labels: Target ids, `IGNORE_INDEX` elsewhere.
        offsets: Character span of each token in the rendered text.
        media: Media in order.
        starts: Position of each medium's first token.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def expand(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    media: Sequence[Medium],
    placeholders: dict[int, str],
) -> Tokens:
    """Put each medium's tokens in the place of its placeholder and label the tokens that overlap a target span.

    Args:
        ids: Token ids of the rendered text, one placeholder a medium.
        offsets: Character span of each token.
        spans: Character spans that are targets, ascending and disjoint.
        media: Media in reading order.
        placeholders: Placeholder ids and how they are written.

    Raises:
        BadSampleError: The text holds another number, or other kinds, of placeholders than there are media.
    """
    found = [token for token in ids if token in placeholders]
    if found != [medium.placeholder for medium in media]:
        written = [placeholders[token] for token in found]
        wanted = [placeholders[medium.placeholder] for medium in media]
        raise BadSampleError(
            f"the text holds {len(found)} visual placeholders {written[:8]} but the sample has {len(media)} media "
            f"{wanted[:8]}; a literal placeholder in the text counts as one"
        )
    out = Tokens()
    queue = iter(media)
    span = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if token in placeholders:
            medium = next(queue)
            out.media.append(medium)
            out.starts.append(len(out.ids))
            for piece in medium.pieces:
                out.ids += [token] * piece if isinstance(piece, int) else piece
            out.labels += [IGNORE_INDEX] * medium.length
            out.offsets += [(start, end)] * medium.length
            continue
        while span < len(spans) and spans[span][1] <= start:
            span += 1
        target = span < len(spans) and start < spans[span][1] and end > spans[span][0]
        out.ids.append(token)
        out.labels.append(token if target else IGNORE_INDEX)
        out.offsets.append((start, end))
    if out.labels:
        out.labels[0] = IGNORE_INDEX  # nothing precedes it; in a packed row its predecessor is another document
    return out


def truncate(tokens: Tokens, max_length: int | None) -> Tokens:
    """Cut to `max_length` tokens; a medium that does not fit whole goes, with all that follows it."""
    if max_length is None or len(tokens.ids) <= max_length:
        return tokens
    cut = max_length
    kept = 0
    for medium, start in zip(tokens.media, tokens.starts, strict=True):
        if start + medium.length > cut:
            cut = min(cut, start)
            break
        kept += 1
    return Tokens(
        tokens.ids[:cut], tokens.labels[:cut], tokens.offsets[:cut], tokens.media[:kept], tokens.starts[:kept]
    )
