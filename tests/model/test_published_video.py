"""Visual tokens of the video systems, from their recipes and the shapes of the backbones that these name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevlm.connectors.base import connector_grid, parse_connector
from sparsevlm.data.video import VideoPolicy, sample_frame_indices
from sparsevlm.model.backbones import backbone_config
from sparsevlm.recipe.load import load_recipe
from sparsevlm.vision.encoder import default_image_size, feature_dim, output_grid
from sparsevlm.vision.tokens import Grid, MediaKind

RECIPES = Path(__file__).parents[2] / "recipes"
HOUR = 3600 * 25

# recipe, tokens of a picture, tokens of an hour of video at 25 frames a second (None: the system takes no video)
PUBLISHED = [
    ("minigpt4_video/llama2_7b.yaml", 64, 45 * 64),
    ("minigpt4_video/mistral_7b.yaml", 64, 90 * 64),
    ("video_llava/7b.yaml", 256, 8 * 256),  # 8 * 257 there: with the class token, see the recipe
    ("chat_univi/7b.yaml", 112, 4 * 112),
    ("minigpt_v2/7b.yaml", 256, None),
]


@pytest.mark.parametrize(("path", "picture", "video"), PUBLISHED)
def test_tokens_are_the_published_ones(path: str, picture: int, video: int | None) -> None:
    model = load_recipe(RECIPES / path).model
    config = backbone_config(model.vision.path)
    size = model.vision.image_size or default_image_size(config)
    h, w = output_grid(config, size, model.vision.layer, "patch")
    blocks = parse_connector(model.connector)
    assert connector_grid(blocks, Grid(1, h, w), MediaKind.IMAGE).num_tokens == picture
    if video is not None:
        frames = len(sample_frame_indices(HOUR, 25, VideoPolicy.of(model.video.model_dump())))
        assert connector_grid(blocks, Grid(frames, h, w), MediaKind.VIDEO).num_tokens == video


@pytest.mark.parametrize("path", ["minigpt4_video/llama2_7b.yaml", "minigpt_v2/7b.yaml"])
def test_minigpt_joins_four_patches_of_eva(path: str) -> None:
    model = load_recipe(RECIPES / path).model
    widths = [feature_dim(backbone_config(model.vision.path), model.vision.layer)]
    for spec in parse_connector(model.connector):
        widths.append(spec.output_dim(widths[-1], 4096))
    assert widths == [1408, 5632, 4096]
