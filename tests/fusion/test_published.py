"""Published counts of CogVLM-17B, from its shipped recipe."""

from __future__ import annotations

from sparsevlm.recipe.load import load_recipe
from sparsevlm.train.plan import plan
from tests.train.planned import stage_of

EXPERT = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # QKV and output, and the FFN, in every layer
PROJECTOR = 142_614_528
MARKS = 2 * 4096
VICUNA = 6_738_415_616
TOWER = 4_348_720_896
LAST_LAYER = 1792 * 3 * 1792 + 1792**2 + 2 * 1792 * 15360 + (2 + 1 + 1 + 4) * 1792 + 15360  # CogVLM's has none


def test_counts_are_the_published_ones() -> None:
    document = plan(load_recipe("recipes/cogvlm/17b.yaml"), ["640x480", "50x900"])
    assert EXPERT == 6_476_005_376
    for name, tokens in (("caption", 256 + 2), ("ground", 256 + 2), ("ground_490", 1225 + 2), ("chat", 1225 + 2)):
        assert stage_of(document, name)["visual_tokens"] == {"640x480": tokens, "50x900": tokens}
    counts = stage_of(document, "caption")["parameters"]
    assert counts["trainable"] == EXPERT + PROJECTOR + MARKS  # 6.6 B; the paper says 6.5 B
    assert counts["total"] == TOWER + EXPERT + PROJECTOR + MARKS + VICUNA  # 17.7 B
    assert counts["activated"] == counts["total"] - EXPERT  # 11.2 B: a token passes one of the twins
    assert counts["language_model"]["total"] == VICUNA  # 7 B
    vision = counts["total"] - counts["language_model"]["total"] - LAST_LAYER
    assert round(vision / 1e9, 1) == 10.9  # "11B parameters model image features" (section 2.1)
    assert stage_of(document, "chat")["parameters"]["trainable"] == counts["total"]
