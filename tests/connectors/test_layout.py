"""Layout of slices: against transformers' own packing, against the published tables, and for every kind of end."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from sparsevlm.connectors.base import parse_block
from sparsevlm.recipe.tiling import Tiling
from sparsevlm.vision.preprocess import ImageSpec, tower_items
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind, Place, VisualTokens

NEXT = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ONEVISION = [(columns, rows) for columns in range(1, 7) for rows in range(1, 7)]


def items(tiling, size, side=336, grid=24, medium=0):
    spec = ImageSpec(
        side, "pad", (0.0,) * 3, (1.0,) * 3, (grid, grid), tiling=TypeAdapter(Tiling).validate_python(tiling)
    )
    return [item._replace(medium=medium) for item in tower_items(spec, MediaKind.IMAGE, 1, size)]


def tokens_of(shapes, dim=6, seed=0):
    torch.manual_seed(seed)
    features = torch.randn(sum(shape.grid.num_tokens for shape in shapes), dim)
    grids, kinds, media, places = zip(*shapes)
    return VisualTokens(features, grids, kinds, (0,) * len(grids), media, places)


def count(spec, shapes):
    return sum(shape.grid.num_tokens for shape in spec.output_items(shapes))


def build(raw, dim=6):
    torch.manual_seed(1)
    return parse_block({"type": "layout", **raw}).build(dim, dim)


@pytest.mark.parametrize(
    "size, tokens",
    [
        ((336, 336), 1176),
        ((640, 480), 2340),
        ((480, 640), 2352),
        ((672, 672), 2928),
        ((1000, 1000), 2928),
        ((1024, 768), 2340),
        ((1920, 1080), 1948),
        ((1080, 1920), 1968),
        ((1344, 336), 1890),
        ((800, 200), 1890),
        ((336, 1344), 1944),
        ((200, 800), 1944),
        ((500, 333), 1464),
        ((672, 336), 1752),
        ((1008, 336), 2328),
    ],
)
def test_llava_next_counts(size, tokens):
    assert count(parse_block({"type": "layout"}), items({"type": "anyres"}, size)) == tokens


@pytest.mark.parametrize(
    "size, tokens",
    [
        ((336, 336), 1485),
        ((640, 480), 2929),
        ((480, 640), 2943),
        ((672, 672), 3699),
        ((1000, 1000), 7371),
        ((1024, 768), 4725),
        ((1920, 1080), 7269),
        ((1080, 1920), 7317),
        ((1344, 336), 3672),
        ((336, 1344), 3753),
        ((500, 333), 1836),
        ((2304, 2304), 7371),
        ((4096, 2160), 7337),
    ],
)
def test_onevision_counts(size, tokens):
    shapes = items({"type": "onevision"}, size, side=384, grid=27)
    assert count(parse_block({"type": "layout", "max_squares": 9}), shapes) == tokens


@pytest.mark.parametrize(
    "model, grids, options, extra",
    [
        (LlavaNextModel, NEXT, {}, {"vision_feature_select_strategy": "default"}),
        (LlavaOnevisionModel, ONEVISION, {"max_squares": 9}, {"vision_aspect_ratio": "anyres_max_9"}),
    ],
)
def test_picture_is_packed_as_transformers_packs_it(model, grids, options, extra):
    side, patch, dim = 28, 4, 6
    grid = side // patch
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=side, patch_size=patch),
        image_grid_pinpoints=[(rows * side, columns * side) for columns, rows in grids],
    )
    block = build(options, dim)
    tiling = {"type": "anyres", "grids": grids}
    generator = random.Random(0)
    for seed in range(200):
        size = tuple(round(math.exp(generator.uniform(math.log(20), math.log(600)))) for _ in range(2))
        tokens = tokens_of(items(tiling, size, side, grid), dim, seed)
        [expected], _ = model.pack_image_features(
            SimpleNamespace(config=config),
            [torch.stack(tokens.split())],
            torch.tensor([size[::-1]]),
            image_newline=block.learned["row_end"],
            **extra,
        )
        torch.testing.assert_close(block(tokens).features, expected, rtol=0, atol=0)


TILINGS = [{"type": "monkey"}, {"type": "anyres"}, {"type": "onevision"}, {"type": "uhd"}]
LAYOUTS = [
    {},
    {"max_squares": 2.5},
    {"join": False, "slice_end": True, "slice_row_end": True},
    {"row_end": "all", "unpad": False, "start": True, "end": True},
    {"row_end": "none", "frame_end": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_module_gives_the_counted_items_for_any_size(tiling, layout):
    block, generator = build(layout, 2), random.Random(3)
    for _ in range(30):
        shapes = [ItemShape(Grid(3, 4, 4), MediaKind.VIDEO, 0)]
        for medium in range(1, 6):
            size = tuple(round(math.exp(generator.uniform(0, math.log(4000)))) for _ in range(2))
            shapes += items(tiling, size, 336, 4, medium)
        result = block(tokens_of(shapes, 2))
        assert result.shapes == block.spec.output_items(shapes)
        assert all(shape.grid.num_tokens > 0 for shape in result.shapes)


def naive_rows(tokens, newline):
    """Overview, then the rows of the joined slices, by loops over single tokens."""
    overview, *slices = tokens.split()
    place, grid = tokens.places[0], tokens.grids[0]
    rows = [overview]
    for y in range(place.rows * grid.h):
        for x in range(place.cols * grid.w):
            row, col = y // grid.h, x // grid.w
            rows.append(slices[row * place.cols + col][(y % grid.h) * grid.w + x % grid.w][None])
        rows.append(newline[None])
    return torch.cat(rows)


def test_slices_are_joined_row_by_row():
    block = build({"unpad": False})
    tokens = tokens_of(items({"type": "anyres", "grids": [(3, 2)]}, (10, 10), 8, 3))
    assert torch.equal(block(tokens).features, naive_rows(tokens, block.learned["row_end"]))


def test_padding_is_what_unpad_takes_away():
    """A picture twice as wide as high in a square grid leaves a quarter empty above, and below."""
    shapes = items({"type": "anyres", "grids": [(2, 2)]}, (400, 200), 8, 4)
    tokens = tokens_of(shapes)
    block, whole = build({"row_end": "none"}), build({"row_end": "none", "unpad": False})
    joined = block(tokens).features[16:].view(4, 8, -1)
    assert torch.equal(joined, whole(tokens).features[16:].view(8, 8, -1)[2:6])


def test_slices_that_are_not_joined_are_followed_by_their_ends():
    block = build({"join": False, "row_end": "none", "slice_end": True, "slice_row_end": True, "start": True})
    tokens = tokens_of(items({"type": "monkey", "rows": 2, "columns": 2}, (9, 9), 8, 2))
    comma, line, start = (block.learned[name] for name in ("slice_end", "slice_row_end", "start"))
    a, b, c, d, whole = tokens.split()
    expected = torch.cat([start[None], a, comma[None], b, line[None], c, comma[None], d, line[None], whole])
    assert torch.equal(block(tokens).features, expected)


def test_frames_of_a_video_end_with_their_own_token():
    block = build({"row_end": "all", "frame_end": True, "start": True, "end": True})
    tokens = tokens_of([ItemShape(Grid(2, 2, 2), MediaKind.VIDEO, 0)])
    row, frame, start, end = (block.learned[name][None] for name in ("row_end", "frame_end", "start", "end"))
    f = tokens.features
    one = [f[0:2], row, f[2:4], row, frame]
    two = [f[4:6], row, f[6:8], row, frame]
    assert torch.equal(block(tokens).features, torch.cat([start, *one, *two, end]))


def test_picture_without_slices_ends_with_one_row_end():
    block = build({})
    tokens = tokens_of([ItemShape(Grid(1, 2, 2), MediaKind.IMAGE, 0)])
    assert torch.equal(block(tokens).features, torch.cat([tokens.features, block.learned["row_end"][None]]))


def test_every_learned_token_gets_a_gradient_from_any_batch():
    block = build({"join": False, "row_end": "all", "slice_end": True, "slice_row_end": True, "frame_end": True})
    block(tokens_of([ItemShape(Grid(1, 2, 2), MediaKind.IMAGE, 0)])).features.sum().backward()
    assert all(token.grad is not None for token in block.learned.values())
    assert block.learned["row_end"].grad.abs().sum() > 0 and block.learned["slice_end"].grad.abs().sum() == 0


@pytest.mark.parametrize("change", ["missing", "grids", "frames"])
def test_refuses_slices_that_are_no_picture(change):
    shapes = items({"type": "monkey"}, (9, 9), 8, 2)
    if change == "missing":
        del shapes[1]
    else:
        shapes[1] = shapes[1]._replace(grid=Grid(1, 1, 4) if change == "grids" else Grid(2, 2, 1))
    with pytest.raises(ValueError, match="slices"):
        parse_block({"type": "layout"}).output_items(shapes)


def test_learned_tokens_are_as_wide_as_published():
    block = build({"start": True}, 4096)
    assert list(block.learned) == ["row_end", "start"]
    for token in block.learned.values():
        assert token.std().item() == pytest.approx(4096**-0.5, rel=0.05)  # 4096 draws: 1 % is one standard error


def test_joined_slices_are_one_slice_of_the_same_picture():
    block = build({})
    result = block(tokens_of(items({"type": "anyres"}, (700, 500), 336, 2)))
    assert result.places == (Place(-1, -1, 2, 2, 500, 700), Place(0, 0, 1, 1, 500, 700))
    assert result.kinds == (MediaKind.IMAGE, MediaKind.SLICE)


@pytest.mark.parametrize("low, native, tokens", [((10, 13), (15, 20), 458), ((12, 12), (12, 12), 315)])
def test_two_views_of_a_picture_as_oryx_lays_them_out(low, native, tokens):
    """begin, rows of the small view, separator, rows of the large one, end: 3 + h (w + 1) of each."""
    shapes = [
        ItemShape(Grid(1, *low), MediaKind.IMAGE, 0, Place(-1, -1, 1, 1, 480, 640)),
        ItemShape(Grid(1, *native), MediaKind.IMAGE, 0, Place(0, 0, 1, 1, 480, 640)),
    ]
    block = build({"row_end": "all", "frame_end": True, "start": True, "end": True})
    result = block(tokens_of(shapes)).features
    assert len(result) == tokens == 3 + low[0] * (low[1] + 1) + native[0] * (native[1] + 1)
    assert torch.equal(result[1 + low[0] * (low[1] + 1)], block.learned["frame_end"])
