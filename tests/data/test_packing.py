"""Packing and grouping against exhaustive search and by property."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.data.packing import group_by_length, pack

LENGTHS = st.lists(st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=40)


def fits(rows: list[list[int]], lengths: list[tuple[int, int]], max_length: int, max_visual: int) -> bool:
    return all(
        sum(lengths[i][0] for i in row) <= max_length and sum(lengths[i][1] for i in row) <= max_visual for row in rows
    )


@given(LENGTHS, st.integers(20, 60), st.integers(20, 60))
def test_nothing_lost_nothing_twice_budgets_kept(lengths: list[tuple[int, int]], tokens: int, visual: int) -> None:
    rows = pack(lengths, tokens, visual)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert fits(rows, lengths, tokens, visual)
    assert rows == pack(lengths, tokens, visual)
    bound = max(-(-sum(n for n, _ in lengths) // tokens), -(-sum(v for _, v in lengths) // visual))
    assert len(rows) >= bound


def optimum(lengths: list[tuple[int, int]], tokens: int, visual: int) -> int:
    """Fewest rows, by trying every assignment."""
    for count in range(len(lengths) + 1):
        for assignment in itertools.product(range(count), repeat=len(lengths)):
            rows = [[i for i, row in enumerate(assignment) if row == r] for r in range(count)]
            if fits(rows, lengths, tokens, visual):
                return count
    return len(lengths)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 4)).map(lambda x: (x[0], min(x))), min_size=1, max_size=5))
def test_close_to_the_optimum(lengths: list[tuple[int, int]]) -> None:
    rows, best = len(pack(lengths, 10, 5)), optimum(lengths, 10, 5)
    assert (
        best <= rows <= best + 1
    )  # best fit decreasing is within 11/9 of it for one budget; two cost at most one more


def plain_best_fit(lengths: list[tuple[int, int]], tokens: int, visual: int) -> list[list[int]]:
    """The same, looking at every row for every sample."""
    rows: list[list[int]] = []
    order = sorted(
        range(len(lengths)),
        key=lambda i: (-max(Fraction(lengths[i][0], tokens), Fraction(lengths[i][1], visual)), -lengths[i][0], i),
    )
    for i in order:
        left = [(tokens - sum(lengths[j][0] for j in r), visual - sum(lengths[j][1] for j in r)) for r in rows]
        fitting = [r for r, (t, v) in enumerate(left) if t >= lengths[i][0] and v >= lengths[i][1]]
        if fitting:
            rows[min(fitting, key=lambda r: (left[r][0], -left[r][1], r))].append(i)
        else:
            rows.append([i])
    return rows


@given(LENGTHS, st.sampled_from([20, 32, 64]), st.sampled_from([20, 32, 64]))
def test_the_tree_finds_the_rows_that_a_scan_finds(lengths: list[tuple[int, int]], tokens: int, visual: int) -> None:
    assert pack(lengths, tokens, visual) == plain_best_fit(lengths, tokens, visual)


def test_each_sample_goes_to_the_fullest_row_that_takes_it() -> None:
    assert pack([(6, 0), (5, 0), (4, 0), (3, 0)], 10) == [[0, 2], [1, 3]]


def test_the_visual_budget_binds() -> None:
    assert len(pack([(4, 4)] * 4, 16)) == 1
    assert len(pack([(4, 4)] * 4, 16, 8)) == 2


@pytest.mark.parametrize(("length", "visual"), [((11, 0), None), ((9, 6), 5)])
def test_a_sample_larger_than_a_row_is_refused(length: tuple[int, int], visual: int | None) -> None:
    with pytest.raises(ValueError, match=rf"sample 1 has {length[0]} tokens, {length[1]} of them visual"):
        pack([(1, 0), length], 10, visual)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 7), st.integers(0, 5))
def test_grouping_is_a_permutation_with_like_lengths_together(lengths: list[int], size: int, seed: int) -> None:
    order = group_by_length(lengths, size, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(lengths)))
    full = len(order) // size
    runs = [sorted(lengths[i] for i in order[r * size : (r + 1) * size]) for r in range(full)]
    for a, b in itertools.combinations(runs, 2):
        assert a[-1] <= b[0] or b[-1] <= a[0]  # runs do not interleave
