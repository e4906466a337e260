"""Thousands of random sizes through every shipped recipe at native resolution: what `plan` counts, what the processor
writes, what the published rules say, and what a few are encoded as."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsevlm.connectors.base import connector_items, parse_connector
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_config
from sparsevlm.model.parts import image_spec
from sparsevlm.model.processing_sparsevlm import SparseVLMProcessor
from sparsevlm.recipe.load import load_recipe
from sparsevlm.train.check import ModelCheck
from sparsevlm.train.media import count_visual, parse_medium
from sparsevlm.vision.preprocess import preprocess_medium
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

RECIPES = Path(__file__).parents[2] / "recipes"
NATIVE = {
    str(path.relative_to(RECIPES)): recipe
    for path in sorted(RECIPES.rglob("*.yaml"))
    if (recipe := load_recipe(path)).model.vision.native is not None
}
every_recipe = pytest.mark.parametrize("name", NATIVE)


def processor_of(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> SparseVLMProcessor:
    """The recipe's processor with a tiny tokenizer; counts do not depend on its words."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return SparseVLMProcessor(
        tiny.make_tokenizer(),
        visual=image_spec(recipe.model, build_config(recipe.model, offline_shapes=True)).to_dict(),
        connector=list(recipe.model.connector),
        video=recipe.model.video.model_dump(),
        chat_template=tiny.make_tokenizer().chat_template,
    )


def some_sizes(number: int, largest: float) -> list[tuple[int, int]]:
    """Sizes of all magnitudes and shapes, thin ones among them."""
    generator = random.Random(0)
    return [(int(10 ** generator.uniform(0, largest)), int(10 ** generator.uniform(0, largest))) for _ in range(number)]


def oryx(width: int, height: int, frames: int) -> int:
    """Tokens by the rules of Oryx's `mm_utils.py` and `multimodal_projector/builder.py`; a side never becomes 0."""

    def resized(size: tuple[float, float], base: float, multiple: int, most: float, least: float) -> tuple[int, int]:
        area = size[0] * size[1]
        if base:
            scale = math.sqrt(base**2 / area)
        else:
            scale = (
                math.sqrt(most**2 / area) if area > most**2 else math.sqrt(least**2 / area) if area < least**2 else 1
            )
        w, h = (max(int(side * scale / multiple), 1) * multiple for side in size)
        return w, h

    if frames:
        multiple = 128 if frames >= 65 else 64
        w, h = resized((width, height), 0, multiple, 480, 288)
        cells = multiple // 2  # of 16 pixels, compressed 2 or 4 times a side
        return 2 + frames * (h // cells * (w // cells + 1) + 1)
    if min(width, height) < 32:
        scale = 64 / min(width, height)
        width, height = int(width * scale), int(height * scale)
    high = resized((width, height), 0, 32, 1536, 0)
    low = resized(high, 384, 32, 0, 0)
    return 3 + sum(h // 16 * (w // 16 + 1) for w, h in (low, high))


def fuyu(width: int, height: int, frames: int) -> int:
    """Patches of 30 and a token a row, below 1920 x 1080."""
    if width > 1920 or height > 1080:
        scale = min(1920 / width, 1080 / height)
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    return max(frames, 1) * math.ceil(height / 30) * (math.ceil(width / 30) + 1)


PUBLISHED = {"oryx/7b.yaml": oryx, "otterhd/8b.yaml": fuyu}


def test_every_recipe_has_its_published_rule() -> None:
    assert PUBLISHED.keys() == NATIVE.keys()


@every_recipe
def test_plan_counts_what_the_processor_writes_and_the_rules_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = NATIVE[name]
    processor, check = processor_of(recipe, monkeypatch), ModelCheck(recipe)
    config = check.config()
    pictures = check.pictures(config, check.image_size(config, next(iter(recipe.stages))))
    most = recipe.model.video.max_frames
    generator = random.Random(1)
    for size in some_sizes(3000, 4.3):
        frames = generator.choice([0, 0, 2, 3, 64, 65, generator.randint(2, most)])
        frames = min(frames, most)
        medium = parse_medium(f"{frames}f@{size[0]}x{size[1]}" if frames else f"{size[0]}x{size[1]}")
        planned = count_visual(recipe, pictures, medium)
        written = processor.medium(medium.kind, medium.frames, size)
        assert planned == written.num_tokens == PUBLISHED[name](*size, frames), medium
        assert planned == sum(piece for piece in written.pieces if isinstance(piece, int))


@every_recipe
def test_what_is_counted_is_what_is_encoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = NATIVE[name]
    processor = processor_of(recipe, monkeypatch)
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate(some_sizes(12, 2.7)):
        picture = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
        medium = Media(MediaKind.VIDEO, [picture] * 3) if i % 3 == 2 else Media(MediaKind.IMAGE, picture)
        sample = Sample((Message("user", (medium, "what ?")), Message("assistant", ("a cat",))))
        encoded = processor.encode(sample)
        frames = 3 if medium.kind is MediaKind.VIDEO else 1
        placeholder = processor.video_token_id if frames == 3 else processor.image_token_id
        written = int((encoded.input_ids == placeholder).sum())
        assert written == PUBLISHED[name](width, height, 0 if frames == 1 else 3) == encoded.num_visual_tokens
        assert processor.measure(sample) == (encoded.length, written)
        assert encoded.pixel_values is not None
        assert encoded.pixel_values.shape[0] == sum(item.grid.num_tokens for item in encoded.items)


@every_recipe
def test_a_long_video_is_encoded_as_it_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = NATIVE[name]
    processor = processor_of(recipe, monkeypatch)
    frames = min(66, recipe.model.video.max_frames)
    pixels = preprocess_medium([Image.new("RGB", (64, 48))] * frames, MediaKind.VIDEO, processor.image_spec)
    items = processor.medium(MediaKind.VIDEO, frames, (64, 48)).shapes
    assert len(pixels) == sum(item.grid.num_tokens for item in items)
    after = connector_items(parse_connector(recipe.model.connector), list(items))
    assert sum(item.grid.num_tokens for item in after) == PUBLISHED[name](64, 48, frames)
