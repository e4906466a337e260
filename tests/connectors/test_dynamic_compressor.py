"""Oryx's compressor against the loop over regions that its formula is."""

from __future__ import annotations

import math

import pytest
import torch

from sparsevlm.connectors.base import parse_block
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

ITEMS = [
    (Grid(1, 3, 5), MediaKind.IMAGE),
    (Grid(2, 4, 6), MediaKind.VIDEO),
    (Grid(3, 8, 4), MediaKind.LONG_VIDEO),
    (Grid(1, 2, 2), MediaKind.MULTI_VIEW),
    (Grid(1, 4, 4), MediaKind.LONG_VIDEO),
]
RATIOS = {MediaKind.IMAGE: 1, MediaKind.VIDEO: 2, MediaKind.MULTI_VIEW: 2, MediaKind.LONG_VIDEO: 4}


def tokens(items=ITEMS, dim=12):
    grids, kinds = zip(*items, strict=True)
    torch.manual_seed(0)
    features = torch.randn(sum(grid.num_tokens for grid in grids), dim)
    return VisualTokens(features, grids, kinds, tuple(range(len(items))))


def build(**options):
    torch.manual_seed(1)
    return parse_block({"type": "dynamic_compressor", **options}).build(12, 8)


@torch.no_grad()
def naive(block, features, grid, ratio):
    """One region at a time: mean, scores of its members, their weighted sum, and the mean again."""
    frames = features.view(*grid, -1)
    out = []
    for frame in frames:
        for top in range(0, grid.h, ratio):
            for left in range(0, grid.w, ratio):
                members = [frame[top + dy, left + dx] for dy in range(ratio) for dx in range(ratio)]
                mean = torch.stack(members).sum(0) / len(members)
                query = block.query.weight @ mean + block.query.bias
                keys = [block.key.weight @ member + block.key.bias for member in members]
                weights = [math.exp(float(query @ key) / math.sqrt(len(query))) for key in keys]
                out.append(mean + sum(w * member for w, member in zip(weights, members, strict=True)) / sum(weights))
    return torch.stack(out)


def test_each_region_is_the_formula():
    block, given = build(), tokens()
    result = block(given)
    for features, grid, kind, got in zip(given.split(), given.grids, given.kinds, result.split(), strict=True):
        expected = naive(block, features, grid, RATIOS[kind])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # measured: 4e-7
    assert result.grids == (Grid(1, 3, 5), Grid(2, 2, 3), Grid(3, 2, 1), Grid(1, 1, 1), Grid(1, 1, 1))


def test_ratio_one_doubles_as_oryx_does_or_leaves_tokens_alone():
    given = tokens([(Grid(1, 3, 5), MediaKind.IMAGE)])
    block = build()
    result = block(given).features
    assert torch.equal(result, 2 * given.features)
    result.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
    assert torch.equal(build(double=False)(given).features, given.features)


def test_equal_members_come_out_doubled_at_every_ratio():
    given = tokens([(Grid(2, 4, 4), MediaKind.VIDEO), (Grid(1, 4, 4), MediaKind.LONG_VIDEO)])
    value = torch.randn(12)
    result = build()(given.with_features(value.expand_as(given.features)))
    torch.testing.assert_close(result.features, (2 * value).expand_as(result.features), rtol=1e-6, atol=1e-6)


def test_regions_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"6 x 5 tokens \(video\).*regions of 2 x 2"):
        parse_block({"type": "dynamic_compressor"}).output_grid(Grid(1, 6, 5), MediaKind.VIDEO)
