"""What `plan --media` says of any picture and video is what the processor writes, for every shipped recipe.

Thousands of sizes are compared by arithmetic; a few pictures and a video are encoded and their placeholders counted.
Towers have their published shapes (no weights); tokenizers are tiny.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparsevlm.data.media import count_frames
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.backbones import known_backbones
from sparsevlm.model.build import build_processor
from sparsevlm.model.parts import PACKAGED
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.check import ModelCheck
from sparsevlm.train.media import Medium, count_visual, parse_medium
from sparsevlm.train.plan import plan
from sparsevlm.vision.tokens import MediaKind
from tests.data.media_files import write_video
from tests.train.planned import recipe_of

RECIPES = Path(__file__).parents[2] / "recipes"
PICTURES, VIDEOS = 2000, 200
SIDES = [(1, 1), (1, 700), (700, 1), (4096, 4096), (3999, 40), (31, 2600)]
"""Sizes that a random draw would hardly meet."""


def distinct_recipes() -> Iterator[Any]:
    """One recipe of those that show their model the same."""
    seen = set()
    for path in sorted(RECIPES.rglob("*.yaml")):
        recipe = load_recipe(path)
        key = (
            recipe.model.model_dump_json(exclude={"language"}),
            *(recipe.image_size_in(name) for name in recipe.stages),
        )
        if key not in seen:
            seen.add(key)
            yield pytest.param(path, id=str(path.relative_to(RECIPES)))


def with_small_texts(recipe: Recipe, parts: dict[str, str]) -> Recipe:
    """Replace what would have to be downloaded, or made first: tokenizers of blocks, and parts without known shapes."""
    model = recipe.model
    if not is_known(model.language.path):
        model.language.path = parts["language"]
    if not is_known(model.vision.path):
        model.vision.path, model.vision.image_size = parts["vision"], None
    model.connector = [_local(block, parts["language"]) for block in model.connector]
    return recipe


def is_known(path: str) -> bool:
    """Tell whether the package has a part, or its shapes."""
    return path.startswith(PACKAGED) or path in known_backbones()


def _local(block: dict[str, Any], path: str) -> dict[str, Any]:
    """Replace the tokenizer of a text-guided block, at whatever depth it is named."""
    inner = {name: _local(value, path) if isinstance(value, dict) else value for name, value in block.items()}
    return inner | ({"tokenizer": path} if inner.get("tokenizer", "language") != "language" else {})


def media(generator: random.Random) -> Iterator[Medium]:
    """Random pictures and videos, sizes and frame counts evenly over their orders of magnitude."""

    def number(most: float) -> int:
        return round(most ** generator.random())

    for size in SIDES:
        yield Medium("", MediaKind.IMAGE, 1, size)
    for _ in range(PICTURES):
        yield Medium("", MediaKind.IMAGE, 1, (number(4000), number(4000)))
    for _ in range(VIDEOS):
        yield Medium("", MediaKind.VIDEO, number(20_000), (number(2000), number(2000)))


def counted(count: Callable[[], int]) -> int | str:
    """The count, or why there is none."""
    try:
        return count()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("path", distinct_recipes())
def test_plan_counts_what_the_processor_writes(path: Path, tiny_parts: dict[str, str], tmp_path: Path) -> None:
    recipe = with_small_texts(load_recipe(path), tiny_parts)
    check = ModelCheck(recipe)
    config = check.config()
    clip = write_video(tmp_path / "clip.mp4", frames=23, fps=2)
    for side in dict.fromkeys(recipe.image_size_in(name) for name in recipe.stages):
        stage = next(name for name in recipe.stages if recipe.image_size_in(name) == side)
        pictures = check.pictures(config, check.image_size(config, stage))
        recipe.model.vision.image_size = config.image_size = side
        recipe.model.language.path = tiny_parts["language"]
        processor = build_processor(recipe.model, config)
        generator = random.Random(f"{path.stem} {side}")
        for medium in media(generator):
            planned = counted(lambda: count_visual(recipe, pictures, medium))  # noqa: B023
            written = counted(lambda: processor.count_visual(medium.kind, medium.frames, medium.size))  # noqa: B023
            assert planned == written, medium
            assert isinstance(planned, str) or planned > 0

        for _ in range(3):
            size = (generator.randint(20, 900), generator.randint(20, 900))
            planned = count_visual(recipe, pictures, parse_medium("{}x{}".format(*size)))
            encoded = processor.encode(talk(Media(MediaKind.IMAGE, Image.new("RGB", size, "red"))))
            assert int((encoded.input_ids == processor.image_token_id).sum()) == planned, size
        video = Media(MediaKind.VIDEO, str(clip))
        frames = count_frames(video, processor.video_policy)
        planned = count_visual(recipe, pictures, parse_medium(f"{frames}f@32x32"))
        encoded = processor.encode(talk(video))
        assert int((encoded.input_ids == processor.video_token_id).sum()) == planned


def talk(medium: Media) -> Sample:
    return Sample((Message("user", (medium, "\nwhat is this ?")), Message("assistant", ("a cat",))))


def test_a_budget_of_visual_tokens_is_planned(tiny_parts: dict[str, str]) -> None:
    recipe = recipe_of(tiny_parts, model={"video": {"max_tokens": 100}})
    check = ModelCheck(recipe)
    config = check.config()
    pictures, processor = check.pictures(config, 32), build_processor(recipe.model, config)
    for frames, tokens in ((3, 48), (6, 96), (7, 96), (64, 96)):
        assert count_visual(recipe, pictures, parse_medium(f"{frames}f@32x32")) == tokens
        assert processor.count_visual(MediaKind.VIDEO, frames, (32, 32)) == tokens
    with pytest.raises(RecipeError, match=r"model\.video\.max_tokens: .* 7 frames are 112 visual tokens"):
        plan(recipe_of(tiny_parts, model={"video": {"max_tokens": 100, "min_frames": 8}}))
