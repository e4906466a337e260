"""The resampler against the published modules written out, item by item and head by head."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sparsevlm.connectors.base import parse_block
from sparsevlm.connectors.perceiver_resampler import frame_rows, sincos_2d
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

QWEN_VL = {
    "type": "perceiver_resampler",
    "latents": 256,
    "depth": 1,
    "dim": "language",
    "heads": 32,
    "head_dim": 128,
    "ff_mult": 0,
    "attend_latents": False,
    "residual": False,
    "positions": "sincos",
    "bias": True,
    "project": True,
    "latent_std": 0.02,
}
SMALL_QWEN = QWEN_VL | {"latents": 9, "heads": 2, "head_dim": 8}
SMALL_FLAMINGO = {"type": "perceiver_resampler", "latents": 3, "depth": 2, "heads": 2, "head_dim": 4}
GRIDS = (Grid(1, 4, 4), Grid(3, 2, 2), Grid(1, 2, 5), Grid(1, 4, 4), Grid(5, 1, 3), Grid(1, 3, 3))


def build(raw, input_dim=12, text_dim=16, seed=0):
    torch.manual_seed(seed)
    block = parse_block(raw).build(input_dim, text_dim)
    for parameter in block.parameters():  # norms and biases that would hide a mistake at 1 and 0
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def items(grids=GRIDS, dim=12, seed=1):
    torch.manual_seed(seed)
    kinds = tuple(MediaKind.IMAGE if grid.t == 1 else MediaKind.VIDEO for grid in grids)
    features = torch.randn(sum(grid.num_tokens for grid in grids), dim)
    return VisualTokens(features, tuple(grids), kinds, tuple(range(len(grids))))


def attend(query, keys, values, heads):
    """Softmax attention of `(m, A)` over `(n, A)`, a head at a time; Flamingo scales the query, others the product."""
    rows = []
    for q, k, v in zip(query.chunk(heads, -1), keys.chunk(heads, -1), values.chunk(heads, -1)):
        rows.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(rows, -1)


def open_flamingo(block, x, grid):
    """`PerceiverResampler` of OpenFlamingo (src/helpers.py) for one item ``(n, D)``."""
    if block.frame_embeddings is not None:
        per_frame = grid.h * grid.w
        x = x + torch.cat([e.expand(per_frame, -1) for e in frame_rows(block.frame_embeddings(), grid.t)])
    x = block.input_projection(x)
    latents = block.latents()
    for layer in block.layers:
        media, own = layer.norm_features(x), layer.norm_latents(latents)
        both = torch.cat([media, own])
        read = attend(layer.q_proj(own), layer.k_proj(both), layer.v_proj(both), layer.heads)
        latents = layer.o_proj(read) + latents
        norm, up, _, down = layer.feed_forward
        latents = down(F.gelu(up(norm(latents)))) + latents
    return block.norm(latents)


def mae_positions(dim, side):
    """`get_2d_sincos_pos_embed` of Qwen-VL's visual.py, in numpy."""

    def one(half, places):
        omega = 1.0 / 10000 ** (np.arange(half // 2, dtype=np.float32) / (half / 2.0))
        out = np.einsum("m,d->md", places.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    axis = np.arange(side, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=0)  # width first
    return torch.tensor(np.concatenate([one(dim // 2, grid[0]), one(dim // 2, grid[1])], axis=1)).float()


def qwen_vl(block, x, grid):
    """`Resampler` of Qwen-VL (visual.py) with its `ln_post` and `proj`, on torch's own attention module."""
    layer, dim = block.layers[0], block.dim
    side = math.isqrt(len(block.latents.weight))
    places = mae_positions(dim, side)
    keys = places.reshape(1, side, side, dim).permute(0, 3, 1, 2)
    if (grid.h, grid.w) != (side, side):
        keys = F.interpolate(keys, size=(grid.h, grid.w), mode="bicubic", align_corners=False)
    keys = keys.permute(0, 2, 3, 1).flatten(0, 2).repeat(grid.t, 1)
    attention = torch.nn.MultiheadAttention(dim, layer.heads)
    linears = layer.q_proj, layer.k_proj, layer.v_proj
    attention.in_proj_weight.data = torch.cat([linear.weight for linear in linears])
    attention.in_proj_bias.data = torch.cat([linear.bias for linear in linears])
    attention.out_proj.load_state_dict(layer.o_proj.state_dict())
    x = layer.norm_features(block.input_projection(x))
    query = layer.norm_latents(block.latents())
    read = attention((query + places)[:, None], (x + keys)[:, None], x[:, None])[0][:, 0]
    return block.norm(read) @ block.projection()


def close(got, expected):
    """Sums of a few dozen float32 products in another order: measured up to 4e-6."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"time_frames": 4}, {"dim": 20}, {"bias": True, "depth": 3}])
def test_flamingo(changes):
    block, tokens = build(SMALL_FLAMINGO | changes), items()
    result = block(tokens)
    assert set(result.grids) == {Grid(1, 1, 3)}
    for x, grid, got in zip(tokens.split(), tokens.grids, result.split()):
        close(got, open_flamingo(block, x, grid))


def test_qwen_vl():
    block, tokens = build(SMALL_QWEN), items()
    result = block(tokens)
    assert result.dim == 16 and set(result.grids) == {Grid(1, 1, 9)}
    for x, grid, got in zip(tokens.split(), tokens.grids, result.split()):
        close(got, qwen_vl(block, x, grid))


def test_positions_are_those_of_mae():
    close(sincos_2d(64, 16, 16), mae_positions(64, 16))


@pytest.mark.parametrize("raw", [SMALL_FLAMINGO, SMALL_QWEN], ids=["flamingo", "qwen_vl"])
def test_a_set_for_each_frame_is_each_frame_as_an_image(raw):
    whole = items((Grid(3, 2, 4),))
    frames = items((Grid(1, 2, 4),) * 3).with_features(whole.features)
    result = build(raw | {"per": "frame"})(whole)
    assert result.grids == (Grid(3, 1, raw["latents"]),)
    close(result.features, build(raw)(frames).features)


def test_order_of_frames_matters_with_time_embeddings_only():
    tokens = items((Grid(3, 2, 2),))
    turned = tokens.with_features(tokens.features.view(3, 4, 12).flip(0).flatten(0, 1))
    plain, timed = build(SMALL_FLAMINGO), build(SMALL_FLAMINGO | {"time_frames": 8})
    close(plain(tokens).features, plain(turned).features)
    assert (timed(tokens).features - timed(turned).features).abs().max() > 1e-2


def test_a_longer_video_gets_time_embeddings_between_the_learned_ones():
    embeddings = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    assert torch.equal(frame_rows(embeddings, 1), embeddings[:1])
    assert frame_rows(embeddings, 5).tolist() == [[0, 10], [0.5, 15], [1, 20], [1.5, 25], [2, 30]]


def test_place_of_a_feature_matters_with_positions_only():
    tokens = items((Grid(1, 3, 4),))
    moved = tokens.with_features(tokens.features.roll(1, 0))
    placed, plain = build(SMALL_QWEN), build(SMALL_QWEN | {"positions": "none"})
    close(plain(tokens).features, plain(moved).features)
    assert (placed(tokens).features - placed(moved).features).abs().max() > 1e-2


def parameters(raw, input_dim, text_dim):
    with torch.device("meta"):
        return sum(p.numel() for p in parse_block(raw).build(input_dim, text_dim).parameters())


def test_published_parameter_counts():
    flamingo = {"type": "perceiver_resampler"}
    assert parameters(flamingo, 1024, 4096) == 63_019_008  # OpenFlamingo, CLIP-L
    # Qwen-VL prints 0.08B for its adapter and leaves the norm and matrix behind it to the tower; Monkey, whose
    # resampler is the same with both, 90M.
    assert parameters(QWEN_VL | {"project": False}, 1664, 4096) - 2 * 4096 == 75_005_952
    assert parameters(QWEN_VL, 1664, 4096) == 75_005_952 + 2 * 4096 + 4096**2 == 91_791_360


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "sincos", "latents": 10}, "no square"),
        ({"positions": "sincos", "dim": 10, "latents": 4}, "divides by 4, got 10"),
        ({"per": "frame", "time_frames": 2}, "time_frames has no meaning"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_block({"type": "perceiver_resampler"} | changes)


def test_refuses_positions_on_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="divides by 4, got 10"):
        parse_block({"type": "perceiver_resampler", "positions": "sincos"}).build(10, 16)
