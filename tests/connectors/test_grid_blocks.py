from math import ceil, floor

import pytest
import torch
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from sparsevlm.connectors.base import map_frames, parse_block
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

GRIDS = (Grid(1, 4, 8), Grid(3, 4, 8), Grid(2, 8, 4), Grid(1, 12, 12), Grid(1, 4, 8))


def batch(grids=GRIDS, dim=3):
    torch.manual_seed(0)
    count = len(grids)
    features = torch.randn(sum(grid.num_tokens for grid in grids), dim)
    return VisualTokens(features, grids, (MediaKind.VIDEO,) * count, tuple(range(count)))


def frames_of(tokens):
    """Yield each item's frames as nested tensors, (t, h, w, D), one item at a time."""
    for grid, features in zip(tokens.grids, tokens.split()):
        yield grid, features.reshape(*grid, tokens.dim)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_shuffle_against_a_loop(factor):
    tokens = batch()
    result = parse_block({"type": "pixel_shuffle", "factor": factor}).build(3, 8)(tokens)
    expected = []
    for grid, frames in frames_of(tokens):
        for t in range(grid.t):
            for y in range(grid.h // factor):
                for x in range(grid.w // factor):
                    square = [
                        frames[t, y * factor + dy, x * factor + dx] for dy in range(factor) for dx in range(factor)
                    ]
                    expected.append(torch.cat(square))
    assert torch.equal(result.features, torch.stack(expected))
    assert result.grids[2] == Grid(2, 8 // factor, 4 // factor)


def test_pixel_shuffle_order_by_hand():
    tokens = VisualTokens(torch.arange(16.0)[:, None], (Grid(1, 4, 4),), (MediaKind.IMAGE,), (0,))
    result = parse_block({"type": "pixel_shuffle"}).build(1, 8)(tokens).features
    assert result.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_order_is_that_of_idefics3(factor):
    tokens = batch((Grid(1, 8, 8),))
    result = parse_block({"type": "pixel_shuffle", "factor": factor}).build(3, 8)(tokens)
    theirs = Idefics3Connector.pixel_shuffle(None, tokens.features[None], factor)
    assert torch.equal(result.features, theirs[0])


@pytest.mark.parametrize("grid", [Grid(1, 4, 6), Grid(1, 7, 7), Grid(1, 3, 4)])
def test_pixel_shuffle_refuses_what_does_not_divide(grid):
    spec = parse_block({"type": "pixel_shuffle", "factor": 4})
    with pytest.raises(ValueError, match=rf"{grid.h} x {grid.w} tokens .* 4 x 4"):
        spec.output_grid(grid, MediaKind.IMAGE)


@pytest.mark.parametrize("number", [1, 2, 4, 8, 16])
def test_concat_against_a_loop(number):
    tokens = batch()
    result = parse_block({"type": "concat", "number": number}).build(3, 8)(tokens)
    expected = []
    for grid, frames in frames_of(tokens):
        for t in range(grid.t):
            raster = [frames[t, y, x] for y in range(grid.h) for x in range(grid.w)]
            expected += [torch.cat(raster[start : start + number]) for start in range(0, len(raster), number)]
    assert torch.equal(result.features, torch.stack(expected))


@pytest.mark.parametrize("side, tokens", [(32, 256), (16, 64)])  # MiniGPT-v2 at 448 px, MiniGPT-4 at 224 px
def test_concat_counts_of_minigpt(side, tokens):
    spec = parse_block({"type": "concat"})
    assert spec.output_grid(Grid(1, side, side), MediaKind.IMAGE).num_tokens == tokens
    assert spec.output_grid(Grid(45, 16, 16), MediaKind.VIDEO).num_tokens == 2880  # MiniGPT4-Video, Llama 2
    assert spec.output_dim(1408, 4096) == 5632


def test_concat_refuses_what_does_not_divide():
    spec = parse_block({"type": "concat"})
    assert spec.output_grid(Grid(2, 6, 6), MediaKind.IMAGE) == Grid(2, 1, 9)
    with pytest.raises(ValueError, match=r"7 x 7 = 49 tokens .* 4"):
        spec.output_grid(Grid(1, 7, 7), MediaKind.IMAGE)


@pytest.mark.parametrize("size", [1, 3, 4, (2, 5), (100, 3)])
def test_adaptive_pool_against_a_loop(size):
    tokens = batch()
    result = parse_block({"type": "adaptive_pool", "size": size}).build(3, 8)(tokens)
    height, width = (size, size) if isinstance(size, int) else size
    expected = []
    for grid, frames in frames_of(tokens):
        rows, columns = min(height, grid.h), min(width, grid.w)
        for t in range(grid.t):
            for i in range(rows):
                for j in range(columns):
                    top, bottom = floor(i * grid.h / rows), ceil((i + 1) * grid.h / rows)
                    left, right = floor(j * grid.w / columns), ceil((j + 1) * grid.w / columns)
                    expected.append(frames[t, top:bottom, left:right].reshape(-1, 3).mean(0))
    torch.testing.assert_close(result.features, torch.stack(expected))


def test_adaptive_pool_never_enlarges():
    tokens = batch()
    result = parse_block({"type": "adaptive_pool", "size": 64}).build(3, 8)(tokens)
    assert result.grids == tokens.grids
    torch.testing.assert_close(result.features, tokens.features)


@pytest.mark.parametrize("size", [0, (3, 0), (1, 2, 3), "big"])
def test_adaptive_pool_refuses(size):
    with pytest.raises(ValueError, match="size"):
        parse_block({"type": "adaptive_pool", "size": size})


def test_map_frames_sees_every_frame_once_in_order():
    tokens, seen = batch(), []

    def note(frames):
        seen.append(tuple(frames.shape))
        return frames * 2

    assert torch.equal(map_frames(tokens, 3, note), tokens.features * 2)
    assert seen == [(4, 4, 8, 3), (2, 8, 4, 3), (1, 12, 12, 3), (1, 4, 8, 3)]
