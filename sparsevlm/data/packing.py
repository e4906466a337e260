"""Rows of samples: packed under two budgets, or grouped by length.

Pure functions on token counts; nothing here knows a sample.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[tuple[int, int]], max_length: int, max_visual: int | None = None) -> list[list[int]]:
    """Pack samples into rows, best fit in decreasing order, under a budget of tokens and one of visual tokens.

    Each sample goes to the fullest row that still takes it. Ties are broken by position, so the result is a function of
    the arguments.

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
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i][0], -lengths[i][1], i))
    rows: list[list[int]] = []
    visual_left: list[int] = []
    free: list[tuple[int, int]] = []  # (tokens left, row) of every row with room, ascending: best fit is a bisection
    for index in order:
        tokens, visual = lengths[index]
        place = bisect_left(free, (tokens, -1))
        while place < len(free) and visual_left[free[place][1]] < visual:
            place += 1
        if place == len(free):
            row = len(rows)
            rows.append([])
            visual_left.append(limit)
            left = max_length
        else:
            left, row = free.pop(place)
        rows[row].append(index)
        visual_left[row] -= visual
        if left > tokens:
            insort(free, (left - tokens, row))
    return rows


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
