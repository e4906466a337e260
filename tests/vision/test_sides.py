"""Sides of pictures at native resolution against the tables and the code of those who published them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pydantic import ValidationError
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from sparsevlm.connectors.base import connector_items, parse_connector
from sparsevlm.data.sample import BadSampleError
from sparsevlm.recipe.native import AreaRule, FitRule, Native, SmartRule
from sparsevlm.vision.preprocess import ImageSpec, tower_items
from sparsevlm.vision.sides import native_items, sides
from sparsevlm.vision.tokens import MediaKind

ORYX: dict[str, Any] = {
    "image": {"type": "area", "multiple": 32, "max_pixels": 1536**2, "min_side": 32},
    "overview": {"type": "area", "multiple": 32, "min_pixels": 384**2, "max_pixels": 384**2},
    "video": {"type": "area", "multiple": 64, "min_pixels": 288**2, "max_pixels": 480**2},
    "long_video": {"type": "area", "multiple": 128, "min_pixels": 288**2, "max_pixels": 480**2},
    "positions": "bilinear",
}
CONNECTOR = parse_connector(
    [
        {"type": "dynamic_compressor"},
        {"type": "mlp"},
        {"type": "layout", "join": False, "row_end": "all", "frame_end": True, "start": True, "end": True},
    ]
)


HALF = (0.5, 0.5, 0.5)
SPEC = ImageSpec(2048, "native", HALF, HALF, (128, 128), native=Native.model_validate(ORYX), long_frames=65)


def count(kind: MediaKind, frames: int, size: tuple[int, int]) -> int:
    items = tower_items(SPEC, kind, frames, size)
    return sum(item.grid.num_tokens for item in connector_items(CONNECTOR, items))


@pytest.mark.parametrize(
    ("size", "native", "low", "tokens"),
    [
        ((384, 384), (384, 384), (384, 384), 1203),
        ((640, 480), (640, 480), (416, 320), 1773),
        ((1000, 667), (992, 640), (448, 288), 3045),
        ((1024, 768), (1024, 768), (416, 320), 3663),
        ((1536, 1536), (1536, 1536), (384, 384), 9915),
        ((1920, 1080), (1920, 1056), (512, 256), 8517),
        ((3840, 2160), (2048, 1152), (512, 288), 9885),
        ((336, 336), (320, 320), (384, 384), 1023),
        ((30, 20), (96, 64), (448, 288), 553),
    ],
)
def test_pictures_of_oryx(size: Any, native: Any, low: Any, tokens: int) -> None:
    overview, whole = native_items(Native.model_validate(ORYX), 16, MediaKind.IMAGE, 1, size)
    assert (overview.grid.w * 16, overview.grid.h * 16) == low
    assert (whole.grid.w * 16, whole.grid.h * 16) == native
    assert overview.place and overview.place.is_overview and whole.place and not whole.place.is_overview
    assert count(MediaKind.IMAGE, 1, size) == tokens


@pytest.mark.parametrize(
    ("size", "frames", "tokens"),
    [
        ((1280, 720), 64, 13506),
        ((1280, 720), 8, 1690),
        ((1920, 1080), 64, 13506),
        ((640, 360), 64, 13506),
        ((854, 480), 64, 13506),
        ((720, 1280), 64, 14146),
        ((480, 480), 1, 2 + 211),
        ((320, 240), 64, 4290),
        ((1280, 720), 192, 8642),
        ((1280, 720), 256, 11522),
        ((480, 480), 256, 11010),
    ],
)
def test_videos_of_oryx(size: tuple[int, int], frames: int, tokens: int) -> None:
    assert count(MediaKind.VIDEO, frames, size) == tokens


@pytest.mark.parametrize("spec", [SPEC, ImageSpec(64, "pad", HALF, HALF, (4, 4), long_frames=65)])
def test_kinds_follow_the_number_of_frames(spec: ImageSpec) -> None:
    kinds = [tower_items(spec, MediaKind.VIDEO, n, (640, 360))[0].kind for n in (64, 65)]
    assert kinds == [MediaKind.VIDEO, MediaKind.LONG_VIDEO]
    assert tower_items(spec, MediaKind.MULTI_VIEW, 99, (640, 360))[0].kind is MediaKind.MULTI_VIEW


@pytest.mark.parametrize(
    ("size", "tokens"),  # (width, height); section 13.1 of OtterHD's numbers, R * (C + 1)
    [
        ((300, 300), 110),
        ((448, 448), 240),
        ((512, 512), 342),
        ((640, 480), 368),
        ((768, 768), 702),
        ((1024, 1024), 1260),
        ((1080, 1080), 1332),
        ((1920, 1080), 2340),
    ],
)
def test_pictures_of_fuyu(size: tuple[int, int], tokens: int) -> None:
    blocks = parse_connector([{"type": "linear"}, {"type": "layout", "join": False, "row_end": "all"}])
    items = native_items(Native(image=FitRule(type="fit")), 30, MediaKind.IMAGE, 1, size)
    assert sum(item.grid.num_tokens for item in connector_items(blocks, items)) == tokens


def test_large_pictures_of_fuyu_are_scaled_into_its_box_and_small_ones_never_up() -> None:
    rule = FitRule(type="fit")
    assert sides(rule, (3840, 2000)) == ((1920, 1000), (1920, 1020))
    assert sides(rule, (31, 29)) == ((31, 29), (60, 30))
    assert sides(rule, (100_000, 3)) == ((1919, 1), (1920, 30))  # cut off, not rounded, as there


def test_smart_rule_is_qwens_function() -> None:
    rule, generator, refused = SmartRule(type="smart"), random.Random(0), 0
    for _ in range(3000):
        size = (int(10 ** generator.uniform(0, 4)), int(10 ** generator.uniform(0, 4)))
        try:
            h, w = smart_resize(size[1], size[0], 28, rule.min_pixels, rule.max_pixels)
        except ValueError:
            refused += 1
            with pytest.raises(BadSampleError, match="differ at most 200 times"):
                sides(rule, size)
        else:
            assert sides(rule, size).canvas == (w, h)
    assert 0 < refused < 1000


def test_every_size_gives_whole_patches_within_the_budget() -> None:
    generator = random.Random(1)
    rule = AreaRule(type="area", multiple=32, min_pixels=64**2, max_pixels=1024**2)
    for _ in range(3000):
        size = (int(10 ** generator.uniform(0, 4.5)), int(10 ** generator.uniform(0, 4.5)))
        (w, h), canvas = sides(rule, size)
        assert canvas == (w, h) and w % 32 == h % 32 == 0 and w >= 32 and h >= 32
        if min(w, h) > 32:  # a side that was cut to nothing became one multiple
            assert w * h <= 1024**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"type": "area", "multiple": 32, "min_pixels": 9, "max_pixels": 4}}, "9 is more than max_pixels 4"),
        ({"image": {"type": "smart", "max_pixels": 4}}, "3136 is more than max_pixels 4"),
        ({"image": {"type": "area"}}, "multiple"),
        ({"image": {"type": "big"}}, "smart"),
    ],
)
def test_sections_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Native.model_validate(ORYX | change)
