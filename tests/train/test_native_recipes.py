"""Published counts of the systems that see pictures in their own shape, from their shipped recipes."""

from __future__ import annotations

import pytest

from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.plan import plan
from tests.train.planned import stage_of

ORYX = {
    "640x480": 1773,
    "1920x1080": 8517,
    "3840x2160": 9885,
    "30x20": 553,
    "64f@1280x720": 13506,
    "8f@1920x1080": 1690,
    "64f@720x1280": 14146,
    "192f@1280x720": 8642,
    "256f@1280x720": 11522,
    "256f@480x480": 11010,
}
FUYU = {"300x300": 110, "448x448": 240, "640x480": 368, "1080x1080": 1332, "1920x1080": 2340}


@pytest.mark.parametrize(
    ("name", "tokens", "connector"),
    [
        # W_q and W_k, the projector, and four learned tokens (begin, end, between, end of a row)
        ("oryx/7b", ORYX, 2 * (1152 * 256 + 256) + 1152 * 3584 + 3584 + 3584 * 3584 + 3584 + 4 * 3584),
        ("otterhd/8b", FUYU, 11_063_296 + 4096),  # Fuyu's linear layer, and the end of a row
    ],
)
def test_tokens_and_parameters_are_the_published_ones(name: str, tokens: dict[str, int], connector: int) -> None:
    document = plan(load_recipe(f"recipes/{name}.yaml"), list(tokens))
    align = stage_of(document, "align")
    assert align["visual_tokens"] == tokens
    assert align["parameters"]["trainable"] == connector
    assert align["flops_per_step"] > 0 and align["memory_per_rank_bytes"] > 0


def test_faults_are_told_at_their_line() -> None:
    recipe = load_recipe("recipes/oryx/7b.yaml", ["model.vision.native.image.multiple=40"])
    with pytest.raises(RecipeError, match=r"multiples of 40 pixels do not hold whole patches of 16"):
        plan(recipe)
    with pytest.raises(RecipeError, match=r"stages.joint.image_size: has no meaning with resize: native"):
        load_recipe("recipes/oryx/7b.yaml", ["stages.joint.image_size=64"])
