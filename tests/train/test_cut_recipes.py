"""Published counts of the systems that see plain or cut pictures, from their shipped recipes."""

from __future__ import annotations

import pytest

from sparsevlm.recipe.load import load_recipe
from sparsevlm.train.plan import plan
from tests.train.planned import stage_of

NEXT = {
    "336x336": 1176,
    "640x480": 2340,
    "480x640": 2352,
    "672x672": 2928,
    "1000x1000": 2928,
    "1024x768": 2340,
    "1920x1080": 1948,
    "1080x1920": 1968,
    "1344x336": 1890,
    "800x200": 1890,
    "336x1344": 1944,
    "200x800": 1944,
    "500x333": 1464,
    "672x336": 1752,
    "1008x336": 2328,
}


@pytest.mark.parametrize(
    ("name", "stage", "tokens", "connector"),
    [
        ("llava/7b", "instruct", {"640x480": 256, "50x900": 256}, 4_198_400),
        ("llava_next/7b", "instruct", NEXT, 20_979_712 + 4096),  # LLaVA-1.5's and the token at the end of rows
    ],
)
def test_tokens_and_parameters_are_the_published_ones(name, stage, tokens, connector):
    document = plan(load_recipe(f"recipes/{name}.yaml"), list(tokens))
    assert stage_of(document, stage)["visual_tokens"] == tokens
    assert stage_of(document, "align")["parameters"]["trainable"] == connector
