"""Rows of samples: packed under two budgets, or grouped by length.

Pure functions on token counts; nothing here knows a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np


def pack(lengths: Sequence[tuple[int, int]], max_length: int, max_visual: int | None = None) -> list[list[int]]:
    """Pack samples into rows, best fit in decreasing order, under a budget of tokens and one of visual tokens.

    The sample that takes the largest share of either budget comes first. Each goes to the row with the fewest tokens
    left that still takes it, of equal ones to that with most visual tokens left. The result is a function of the
    arguments; n samples take O(n log n).

    Args:
        lengths: ``(tokens, visual tokens)`` of each sample.
        max_length: Tokens a row.
        max_visual: Visual tokens a row; None means no limit of their own.

    Returns:
        Indices into `lengths`, a list a row; every index once.

    Raises:
        ValueError: A sample is larger than a row by itself.
    """
    limit = max_length if max_visual is None else max_visual
    for index, (tokens, visual) in enumerate(lengths):
        if tokens > max_length or visual > limit:
            raise ValueError(
                f"sample {index} has {tokens} tokens, {visual} of them visual; a row takes {max_length} and {limit}. "
                "Raise batch.max_length or batch.max_visual_tokens"
            )
    rows: list[list[int]] = []
    open_rows = _OpenRows(max_length)
    share = [max(tokens * limit, visual * max_length) for tokens, visual in lengths]  # of budgets, in whole numbers
    for index in sorted(range(len(lengths)), key=lambda i: (-share[i], -lengths[i][0], i)):
        tokens, visual = lengths[index]
        tokens_left, visual_left, row = open_rows.take(tokens, visual) or (max_length, limit, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        open_rows.put(tokens_left - tokens, visual_left - visual, row)
    return rows


class _OpenRows:
    """Rows by the tokens they have left; finds the fullest one that takes a sample in logarithmic time.

    Rows with the same number of tokens left wait in a heap, the one with most visual tokens left on top. A tree over
    these numbers holds in each node the most visual tokens left below it, so that the first number with enough of both
    is found by climbing until a node has enough and descending to its leftmost leaf.
    """

    def __init__(self, max_length: int) -> None:
        self._size = 1 << max_length.bit_length()  # more than max_length
        self._most = [-1] * (2 * self._size)  # node n has children 2n and 2n + 1; leaves are from _size on
        self._waiting: dict[int, list[tuple[int, int]]] = {}

    def put(self, tokens_left: int, visual_left: int, row: int) -> None:
        """Add a row."""
        heappush(self._waiting.setdefault(tokens_left, []), (-visual_left, row))
        node = tokens_left + self._size
        while node and self._most[node] < visual_left:
            self._most[node] = visual_left
            node >>= 1

    def take(self, tokens: int, visual: int) -> tuple[int, int, int] | None:
        """Remove the fullest row that takes a sample; return what it has left, and its number."""
        most, node = self._most, tokens + self._size
        while most[node] < visual:
            while node & 1:
                node >>= 1
            if node == 0:
                return None
            node += 1
        while node < self._size:
            node <<= 1
            node += most[node] < visual
        tokens_left = node - self._size
        waiting = self._waiting[tokens_left]
        negative, row = heappop(waiting)
        most[node] = -waiting[0][0] if waiting else -1
        while node > 1:
            node >>= 1
            most[node] = max(most[2 * node], most[2 * node + 1])
        return tokens_left, -negative, row


def group_by_length(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[int]:
    """Order samples so that each run of `size` (the rows of a step) has like lengths, and runs come in random order.

    Args:
        lengths: Tokens of each sample.
        size: Rows that are padded to a common length.
        rng: Source of the order of runs, and of the order among equal lengths.

    Returns:
        A permutation of the indices. Where `size` does not divide their number, the short run comes last.
    """
    shuffled = rng.permutation(len(lengths))
    ordered = shuffled[np.argsort(np.asarray(lengths)[shuffled], kind="stable")]
    full = len(ordered) // size
    # The odd ones are drawn from all lengths, or always the longest samples would be in the short run.
    odd = rng.choice(len(ordered), len(ordered) - full * size, replace=False) if len(ordered) % size else []
    kept = np.delete(ordered, odd).reshape(full, size)
    runs = [kept[i] for i in rng.permutation(full)]
    return [int(i) for run in [*runs, ordered[odd] if len(odd) else []] for i in run]
