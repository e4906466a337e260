"""Token layout of one conversation: targets from character spans, placeholders expanded, cuts between visual blocks.

Pure functions on lists; the processor feeds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError
from sparsevlm.vision.tokens import Grid, MediaKind


@dataclass(frozen=True)
class Item:
    """One visual item as the prompt sees it.

    Attributes:
        kind: Media kind.
        grid: Tower grid, before the connector.
        num_tokens: Tokens after the connector.
        placeholder: Token id that is repeated for it.
    """

    kind: MediaKind
    grid: Grid
    num_tokens: int
    placeholder: int


@dataclass
class Tokens:
    """A tokenised conversation.

    Attributes:
        ids: Token ids, placeholders expanded.
        labels: Target ids, `IGNORE_INDEX` elsewhere.
        offsets: Character span of each token in the rendered text.
        items: Visual items in order.
        starts: Position of each item's first placeholder.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def expand(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    items: Sequence[Item],
    placeholders: dict[int, str],
) -> Tokens:
    """Repeat placeholders to each item's token count and label the tokens that overlap a target span.

    Args:
        ids: Token ids of the rendered text, one placeholder an item.
        offsets: Character span of each token.
        spans: Character spans that are targets, ascending and disjoint.
        items: Visual items in reading order.
        placeholders: Placeholder ids and how they are written.

    Raises:
        BadSampleError: The text holds another number, or other kinds, of placeholders than there are items.
    """
    found = [token for token in ids if token in placeholders]
    if found != [item.placeholder for item in items]:
        written = [placeholders[token] for token in found]
        wanted = [placeholders[item.placeholder] for item in items]
        raise BadSampleError(
            f"the text holds {len(found)} visual placeholders {written[:8]} but the sample has {len(items)} media "
            f"{wanted[:8]}; a literal placeholder in the text counts as one"
        )
    out = Tokens()
    queue = iter(items)
    span = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if token in placeholders:
            item = next(queue)
            out.items.append(item)
            out.starts.append(len(out.ids))
            out.ids += [token] * item.num_tokens
            out.labels += [IGNORE_INDEX] * item.num_tokens
            out.offsets += [(start, end)] * item.num_tokens
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
    """Cut to `max_length` tokens; a visual block that does not fit whole goes, with all that follows it."""
    if max_length is None or len(tokens.ids) <= max_length:
        return tokens
    cut = max_length
    kept = 0
    for item, start in zip(tokens.items, tokens.starts, strict=True):
        if start + item.num_tokens > cut:
            cut = min(cut, start)
            break
        kept += 1
    return Tokens(
        tokens.ids[:cut], tokens.labels[:cut], tokens.offsets[:cut], tokens.items[:kept], tokens.starts[:kept]
    )
