"""Placeholders, labels and cuts on lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError
from sparsevlm.model.layout import Medium, Tokens, expand, truncate
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind

IMAGE, VIDEO = 90, 91
NAMES = {IMAGE: "<image>", VIDEO: "<video>"}


def item(n: int, kind: MediaKind = MediaKind.IMAGE) -> Medium:
    shape = ItemShape(Grid(1, 1, n), kind)
    return Medium(kind, (shape,), IMAGE if kind is MediaKind.IMAGE else VIDEO, (n,))


def test_expansion_by_hand() -> None:
    tokens = expand(
        [1, IMAGE, 2, 3, VIDEO, 4],
        [(0, 1), (1, 8), (8, 9), (10, 11), (11, 18), (18, 19)],
        [(9, 11), (18, 19)],
        [item(3), item(2, MediaKind.VIDEO)],
        NAMES,
    )
    assert tokens.ids == [1, IMAGE, IMAGE, IMAGE, 2, 3, VIDEO, VIDEO, 4]
    assert tokens.labels == [IGNORE_INDEX] * 5 + [3, IGNORE_INDEX, IGNORE_INDEX, 4]
    assert tokens.starts == [1, 6]


@pytest.mark.parametrize(
    ("ids", "items"),
    [([1, IMAGE], []), ([1], [item(2)]), ([IMAGE], [item(2, MediaKind.VIDEO)]), ([IMAGE, IMAGE], [item(1)])],
)
def test_wrong_placeholders_are_refused_with_both_counts(ids: list[int], items: list[Medium]) -> None:
    with pytest.raises(
        BadSampleError, match=rf"{sum(i in NAMES for i in ids)} visual placeholders.*{len(items)} media"
    ):
        expand(ids, [(i, i + 1) for i in range(len(ids))], [], items, NAMES)


@given(st.lists(st.one_of(st.integers(0, 9), st.tuples(st.sampled_from([IMAGE, VIDEO]), st.integers(1, 6)))), st.data())
def test_cuts_never_go_through_a_visual_block(parts: list, data: st.DataObject) -> None:
    ids = [part if isinstance(part, int) else part[0] for part in parts]
    items = [
        item(part[1], MediaKind.IMAGE if part[0] == IMAGE else MediaKind.VIDEO)
        for part in parts
        if not isinstance(part, int)
    ]
    whole = expand(ids, [(i, i + 1) for i in range(len(ids))], [(0, len(ids))], items, NAMES)
    limit = data.draw(st.integers(0, len(whole.ids) + 2))
    cut = truncate(whole, limit)
    assert len(cut.ids) <= limit
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert cut.labels == whole.labels[: len(cut.labels)]
    assert sum(token in NAMES for token in cut.ids) == sum(i.num_tokens for i in cut.media)
    # Nothing was cut that would have fitted: what follows is the end, a token too many, or a block too large.
    if len(cut.ids) < min(limit, len(whole.ids)):
        blocked = whole.media[len(cut.media)]
        assert whole.starts[len(cut.media)] == len(cut.ids)
        assert len(cut.ids) + blocked.num_tokens > limit


def test_first_token_is_never_a_target() -> None:
    tokens = expand([5, 6], [(0, 1), (1, 2)], [(0, 2)], [], NAMES)
    assert tokens.labels == [IGNORE_INDEX, 6]


def test_no_limit_returns_the_same() -> None:
    tokens = Tokens([1, 2], [1, 2], [(0, 1), (1, 2)])
    assert truncate(tokens, None) is tokens
