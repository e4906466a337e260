"""Published counts of systems with resamplers, Q-Formers and context tokens, from their shipped recipes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from sparsevlm.connectors.base import connector_dims, parse_connector
from sparsevlm.recipe.load import load_recipe
from sparsevlm.train.check import ModelCheck
from sparsevlm.train.media import count_visual, parse_medium
from sparsevlm.train.parts import parts_of
from sparsevlm.train.plan import plan
from sparsevlm.vision.encoder import feature_dim
from tests.train.planned import stage_of

QFORMER, LN_VISION, QUERIES = 105_137_664, 2 * 1408, 32 * 768
READS_TEXT = (30_523 + 512) * 768 + 11 * (
    768 * 3072 * 2 + 3072 + 3 * 768
)  # words, places, text's networks but the last
CONTEXT = {"query": 769 * 1408, "key": 1409 * 1408, "value": 1409 * 4096, "projector": 1409 * 4096 + 4097 * 4096}
D = 5120  # Vicuna-13B
UHD_RESAMPLER = 64 * D + 1024 * D + 4 * (D * D + D) + 3 * 2 * D + D * D
UHD = {"336x336": 64, "500x333": 192, "640x480": 320, "1024x768": 448, "1920x1080": 448, "1344x336": 320}


class Published(NamedTuple):
    """What a recipe must give: visual tokens by medium, and parameters of the connector."""

    tokens: dict[str, int]
    connector: int


SYSTEMS = {
    "llama_vid/7b": Published(
        {"640x480": 2, "3600f@640x480": 7200, "10800f@64x64": 21_600},
        QFORMER + READS_TEXT + QUERIES + LN_VISION + sum(CONTEXT.values()),
    ),
    "blip2/opt2.7b": Published({"640x480": 32}, QFORMER + QUERIES + LN_VISION + 769 * 2560),
    "instructblip/vicuna7b": Published({"640x480": 32}, QFORMER + READS_TEXT + QUERIES + LN_VISION + 769 * 4096),
    "internlm_xcomposer/7b": Published({"640x480": 66}, QFORMER + 64 * 768 + LN_VISION + 3_149_824 + 2 * 4096),
    "internlm_xcomposer/v2_7b": Published({"640x480": 1225}, 1025 * 4096 + 4097 * 4096),
    "qwen_vl/7b": Published({"640x480": 256}, 91_791_360),
    "monkey/7b": Published({"640x480": 1280, "50x900": 1280}, 91_791_360),
    "llava_uhd/13b": Published(UHD, UHD_RESAMPLER),
    "llavar/13b": Published({"640x480": 576}, 5_248_000),
    "svit/13b": Published({"640x480": 576}, 31_467_520),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_tokens_and_parameters(name: str) -> None:
    recipe, published = load_recipe(f"recipes/{name}.yaml"), SYSTEMS[name]
    check = ModelCheck(recipe)
    config = check.config()
    for stage in recipe.stages:
        pictures = check.pictures(config, check.image_size(config, stage))
        tokens = {medium: count_visual(recipe, pictures, parse_medium(medium)) for medium in published.tokens}
        assert tokens == published.tokens
    specs = parse_connector(recipe.model.connector)
    text = config.text_config.hidden_size  # pyright: ignore
    widths = connector_dims(specs, feature_dim(config.vision_config, recipe.model.vision.layer), text)  # pyright: ignore
    with torch.device("meta"):
        blocks = [spec.build(width, text) for spec, width in zip(specs, widths)]
    assert sum(p.numel() for block in blocks for p in block.parameters()) == published.connector


def test_llama_vid_trains_what_its_stages_train() -> None:
    """The projector, and of the context token's parts the projections in, never the Q-Former in the first stage."""
    document = plan(load_recipe("recipes/llama_vid/7b.yaml"), ["640x480"], world=8)
    trained = {name: stage_of(document, name)["parameters"]["trainable"] for name in ("align", "instruct", "long")}
    vicuna = 6_738_415_616
    assert trained["align"] == sum(CONTEXT.values())
    assert trained["long"] == sum(CONTEXT.values()) + vicuna
    assert trained["instruct"] == SYSTEMS["llama_vid/7b"].connector + vicuna
    assert parts_of("model.connector.0.query_projection.weight")[0] == "connector.projector"


def test_monkey_has_lora_for_each_of_four_slices() -> None:
    document = plan(load_recipe("recipes/monkey/7b.yaml"), ["896x896"])
    attention, network = 4 * 16 * (1664 + 1664), 2 * 16 * (1664 + 8192)
    trained = stage_of(document, "slices")["parameters"]["trainable"]
    assert trained == 4 * 48 * (attention + network) + SYSTEMS["monkey/7b"].connector


def test_internlm_xcomposer2_adapts_picture_tokens_alone() -> None:
    document = plan(load_recipe("recipes/internlm_xcomposer/v2_7b.yaml"), ["640x480"], world=64)
    trained = document["stages"][0]["parameters"]["trainable"]
    apart = 32 * 2 * 256 * 4096  # query, key and value share one first matrix there
    assert trained == 603_979_776 + apart + SYSTEMS["internlm_xcomposer/v2_7b"].connector
