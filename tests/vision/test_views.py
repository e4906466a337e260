"""Cutting pictures: published tables of sizes, transformers' own functions, and pixels that come together again."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from sparsevlm.recipe.tiling import Tiling
from sparsevlm.vision.preprocess import ImageSpec, preprocess_picture, tower_items
from sparsevlm.vision.tokens import MediaKind
from sparsevlm.vision.views import best_grid, fit_size, picture_views, uhd_grid

NEXT = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ONEVISION = [(columns, rows) for columns in range(1, 7) for rows in range(1, 7)]
TILINGS = [
    {"type": "monkey", "rows": 2, "columns": 3},
    {"type": "anyres"},
    {"type": "onevision"},
    {"type": "uhd"},
    {"type": "uhd", "max_slices": 9, "scale": 48},
]


def spec(tiling, side=32):
    return ImageSpec(side, "pad", (0.4, 0.5, 0.6), (0.2, 0.25, 0.5), (4, 4), tiling=tiling)


def views(tiling, side, size):
    return picture_views(TypeAdapter(Tiling).validate_python(tiling), side, size)


def random_sizes(number, seed=0):
    generator = random.Random(seed)
    for _ in range(number):
        yield tuple(round(math.exp(generator.uniform(math.log(1), math.log(5000)))) for _ in range(2))


@pytest.mark.parametrize(
    "size, next_grid, onevision_grid",
    [
        ((336, 336), (1, 2), (1, 1)),
        ((640, 480), (2, 2), (2, 2)),
        ((480, 640), (2, 2), (2, 2)),
        ((672, 672), (2, 2), (2, 2)),
        ((1000, 1000), (2, 2), (3, 3)),
        ((1024, 768), (2, 2), (3, 2)),
        ((1920, 1080), (2, 2), (5, 3)),
        ((1080, 1920), (2, 2), (3, 5)),
        ((1344, 336), (3, 1), (4, 1)),
        ((336, 1344), (1, 3), (1, 4)),
        ((800, 200), (3, 1), None),
        ((500, 333), (2, 1), (2, 1)),
        ((1008, 336), (3, 1), None),
        ((2304, 2304), (2, 2), (6, 6)),
        ((4096, 2160), None, (6, 4)),
    ],
)
def test_best_grids_are_the_published_ones(size, next_grid, onevision_grid):
    if next_grid:
        assert best_grid(NEXT, 336, size) == next_grid
    if onevision_grid:
        assert best_grid(ONEVISION, 384, size) == onevision_grid


@pytest.mark.parametrize("grids, side", [(NEXT, 336), (ONEVISION, 384), ([(3, 2), (2, 3), (1, 1)], 14)])
def test_grid_and_fit_are_those_of_transformers(grids, side):
    pinpoints = [(rows * side, columns * side) for columns, rows in grids]  # height first
    for size in random_sizes(3000):
        height, width = select_best_resolution(size[::-1], pinpoints)
        assert best_grid(grids, side, size) == (width // side, height // side), size
        picture = np.broadcast_to(np.zeros(1), (3, *size[::-1]))
        expected = get_patch_output_size(picture, (height, width), "channels_first")
        assert fit_size(size, (width, height)) == expected[::-1], size


UHD = [  # size, grid, LLaVA-UHD's own table at 336 px and at most 7 slices
    ((336, 336), None),
    ((300, 200), None),
    ((640, 480), (2, 2)),
    ((672, 672), (2, 2)),
    ((672, 1008), (2, 3)),
    ((672, 1088), (2, 3)),
    ((1024, 768), (3, 2)),
    ((1000, 1000), (3, 2)),  # a tie but for floating point
    ((1920, 1080), (3, 2)),
    ((1080, 1920), (2, 3)),
    ((1344, 336), (4, 1)),
    ((336, 1344), (1, 4)),
    ((500, 333), (2, 1)),
    ((2000, 500), (6, 1)),
]


@pytest.mark.parametrize("size, grid", UHD)
def test_uhd_grids_are_the_published_ones(size, grid):
    assert uhd_grid(size, 7, 336) == grid


@pytest.mark.parametrize(
    "size, grid", [((640, 480), (2, 1)), ((1024, 768), (2, 2)), ((1344, 1344), (3, 3)), ((1920, 1080), (4, 2))]
)
def test_uhd_grids_with_nine_slices_of_448(size, grid):
    assert uhd_grid(size, 9, 448) == grid


def naive_uhd(size, most, scale):
    """The original's loops."""
    width, height = size
    multiple = min(math.ceil(width * height / (scale * scale)), most)
    if multiple <= 1:
        return None
    candidates = []
    for number in [multiple - 1, multiple, multiple + 1]:
        if number == 1 or number > most:
            continue
        m = 1
        while m <= number:
            if number % m == 0:
                candidates.append((m, number // m))
            m += 1
    best, least = (1, 1), float("inf")
    for grid in candidates:
        error = abs(math.log(width / height) - math.log(grid[0] / grid[1]))
        if error < least:
            best, least = grid, error
    return best


@pytest.mark.parametrize("most, scale", [(7, 336), (9, 448), (1, 336), (2, 100)])
def test_uhd_grid_is_the_naive_one(most, scale):
    for size in random_sizes(3000, seed=1):
        assert uhd_grid(size, most, scale) == naive_uhd(size, most, scale), size


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_views_fill_the_tower_and_name_their_places(tiling):
    for size in random_sizes(500, seed=2):
        found = views(tiling, 32, size)
        slices = [view for view in found if view.kind is MediaKind.SLICE]
        [overview] = [view for view in found if view.kind is MediaKind.IMAGE]
        assert overview.place.is_overview and overview.size == (32, 32)
        assert all(view.frame == (32, 32) for view in found)
        assert all(view.place[4:] == size[::-1] for view in found)
        _, _, rows, cols, *_ = overview.place
        assert [view.place[:4] for view in slices] == [(r, c, rows, cols) for r in range(rows) for c in range(cols)]
        assert overview is found[0] if tiling["type"] in ("anyres", "onevision") else overview is found[-1]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("size", [(90, 70), (32, 32), (200, 61), (1, 900), (900, 1)])
def test_slices_side_by_side_are_the_resized_picture(tiling, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    pictures = spec(tiling)
    frames = preprocess_picture(picture, pictures)
    shapes = tower_items(pictures, MediaKind.IMAGE, 1, size)
    assert frames.shape == (len(shapes), 3, 32, 32)
    rows, cols = shapes[0].place.rows, shapes[0].place.cols
    slices = [frame for frame, shape in zip(frames, shapes) if shape.kind is MediaKind.SLICE]
    if not slices:
        return
    joined = torch.cat([torch.cat(slices[r * cols : (r + 1) * cols], 2) for r in range(rows)], 1)
    joined = joined * torch.tensor(pictures.std).view(3, 1, 1) + torch.tensor(pictures.mean).view(3, 1, 1)
    whole = (cols * 32, rows * 32)
    if tiling["type"] in ("anyres", "onevision"):
        inside = fit_size(size, whole)
        canvas = Image.new("RGB", whole)  # black
        canvas.paste(
            picture.resize(inside, Image.Resampling.BICUBIC), ((whole[0] - inside[0]) // 2, (whole[1] - inside[1]) // 2)
        )
    else:
        canvas = picture.resize(whole, Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-6)  # float32, normalised and back
