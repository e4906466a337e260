"""LLaMA-VID's tokens against its formulas, frame by frame."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sparsevlm.connectors.base import parse_block
from sparsevlm.vision.tokens import Grid, Guides, MediaKind, VisualTokens

QFORMER = {"queries": 3, "dim": 8, "layers": 2, "heads": 2, "ff_dim": 12, "dropout": 0.0, "vocab_size": 20}
SMALL = {"type": "context_token", "qformer": QFORMER}
TEXTS = torch.tensor([[4, 7, 2], [5, 1, 0]])


def build(raw, seed=0):
    torch.manual_seed(seed)
    block = parse_block(raw).build(6, 10).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def items(*grids):
    torch.manual_seed(1)
    kinds = tuple(MediaKind.IMAGE if grid.t == 1 else MediaKind.VIDEO for grid in grids)
    guides = Guides(TEXTS, (TEXTS > 0).long(), tuple(range(len(grids))))
    features = torch.randn(sum(grid.num_tokens for grid in grids), 6)
    return VisualTokens(features, grids, kinds, tuple(range(len(grids))), guides=guides)


def llama_vid(block, frame, item, content):
    """`vlm_attention` of llamavid_arch.py for one frame ``(prefix + n, D)``."""
    ids, mask = TEXTS[item : item + 1], (TEXTS[item : item + 1] > 0).long()
    queries = block.query_projection(block.qformer.read(frame[None], (ids, mask)))[0]
    x = frame[block.spec.prefix :]
    attention = (queries @ block.key_projection(x).T / math.sqrt(x.shape[1])).softmax(-1)
    context = block.value_projection((attention @ x).mean(0))
    up, _, down = block.projector
    return torch.cat([context[None], down(F.gelu(up(content(x))))])


def two_by_two(x):
    """Means of the quarters of a square frame."""
    side = math.isqrt(len(x))
    image, half = x.view(side, side, -1), side // 2
    cells = [image[r : r + half, c : c + half].flatten(0, 1).mean(0) for r in (0, half) for c in (0, half)]
    return torch.stack(cells)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("options", "content", "number"),
    [
        ({}, lambda x: x.mean(0, keepdim=True), 2),
        ({"content": "grid", "grid": 2}, two_by_two, 5),
        ({"content": "all"}, lambda x: x, 17),
    ],
    ids=["mean", "grid", "all"],
)
def test_formulas(options, content, number, prefix):
    block = build(SMALL | options | {"prefix": prefix})
    grids = (Grid(1, 1, 17), Grid(3, 1, 17)) if prefix else (Grid(1, 4, 4), Grid(3, 4, 4))
    tokens = items(*grids)
    result = block(tokens)
    assert result.grids == (Grid(1, 1, number), Grid(3, 1, number))
    for item, (x, grid, got) in enumerate(zip(tokens.split(), grids, result.split())):
        expected = torch.cat([llama_vid(block, frame, item, content) for frame in x.view(grid.t, -1, 6)])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)  # sums in another order: measured 4e-6


def test_pictures_may_keep_more_than_videos_of_their_size():
    block = build(SMALL | {"content": "mean", "picture_content": "all"})
    tokens = items(Grid(1, 4, 4), Grid(2, 4, 4), Grid(1, 4, 4))
    assert tokens.guides is not None
    kinds = (MediaKind.IMAGE, MediaKind.VIDEO, MediaKind.VIDEO)
    tokens = replace(tokens, kinds=kinds, guides=replace(tokens.guides, index=(0, 1, 0)))
    result = block(tokens)
    assert result.grids == (Grid(1, 1, 17), Grid(2, 1, 2), Grid(1, 1, 2))
    picture, _, clip = tokens.split()
    for x, got, content in (
        (picture, result.split()[0], lambda x: x),
        (clip, result.split()[2], lambda x: x.mean(0, keepdim=True)),
    ):
        torch.testing.assert_close(got, llama_vid(block, x, 0, content), rtol=1e-5, atol=2e-5)


def test_a_long_video_is_read_in_blocks(monkeypatch):
    block, tokens = build(SMALL), items(Grid(5, 4, 4))
    whole = block(tokens).features
    monkeypatch.setattr("sparsevlm.connectors.context_token.FRAMES", 2)
    torch.testing.assert_close(block(tokens).features, whole, rtol=1e-5, atol=1e-5)


def test_the_question_changes_the_context_and_not_the_content():
    block, tokens = build(SMALL), items(Grid(1, 4, 4), Grid(1, 4, 4))
    assert tokens.guides is not None
    other = VisualTokens(
        tokens.features,
        tokens.grids,
        tokens.kinds,
        tokens.owners,
        guides=Guides(TEXTS.flip(1), torch.ones_like(TEXTS), (0, 0)),
    )
    first, second = (block(each).features.view(2, 2, 10) for each in (tokens, other))
    assert (first[:, 0] - second[:, 0]).abs().max() > 1e-4
    assert torch.equal(first[:, 1], second[:, 1])


def test_published_counts():
    """LLaMA-VID, 224 px: 2 tokens a frame, 257 an image, an hour at one frame a second 7,200."""
    frame = Grid(1, 1, 257)
    counts = {
        name: parse_block({"type": "context_token", "prefix": 1, **options}).output_grid(frame, MediaKind.IMAGE).w
        for name, options in {
            "mean": {},
            "grid2": {"content": "grid", "grid": 2},
            "grid4": {"content": "grid", "grid": 4},
            "all": {"content": "all"},
        }.items()
    }
    assert counts == {"mean": 2, "grid2": 5, "grid4": 17, "all": 257}
    hour = parse_block({"type": "context_token", "prefix": 1}).output_grid(Grid(3600, 1, 257), MediaKind.VIDEO)
    assert hour.num_tokens == 7200


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"prefix": 1}, Grid(1, 4, 4), "no square of patches"),
        ({"content": "grid", "grid": 3}, Grid(1, 4, 4), "3 x 3 cells do not divide a frame of 4 x 4"),
    ],
)
def test_refuses_frames(options, grid, message):
    with pytest.raises(ValueError, match=message):
        parse_block(SMALL | options).output_grid(grid, MediaKind.IMAGE)


def test_refuses_a_qformer_that_sees_no_text():
    with pytest.raises(ValueError, match="must look at the question"):
        parse_block(SMALL | {"qformer": {**QFORMER, "instruction": False}}).build(6, 10)
