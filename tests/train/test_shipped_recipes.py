"""Every shipped recipe, shrunken to tiny parts and data: two steps of each stage, generation, reloading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsevlm.connectors.base import parse_block
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import dump_recipe, load_recipe
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.train.launch import train
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.train.shrinking import shrink, shrink_block, write_records

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml"))


def test_there_are_recipes_to_test() -> None:
    assert len(SHIPPED) >= 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shrunken_recipe_runs(path: Path, tiny_parts: dict[str, str], tmp_path: Path) -> None:
    recipe = load_recipe(path)
    small = tmp_path / "small.yaml"
    small.write_text(json.dumps(shrink(recipe, tiny_parts, write_records(tmp_path / "data"))))
    rows = train(small)
    assert [row.name for row in rows] == list(recipe.stages)
    assert all(0 < row.loss_last < 10 for row in rows)
    last = tmp_path / "data" / "run" / list(recipe.stages)[-1]
    assert load_recipe(last / "recipe.yaml") == load_recipe(small)
    assert dump_recipe(load_recipe(last / "recipe.yaml")) == (last / "recipe.yaml").read_text()
    model, processor = load_model(last)
    assert (model.config.moe is not None) == any(stage.upcycle for stage in recipe.stages.values())
    question = Sample((Message("user", (Media(MediaKind.IMAGE, tiny.picture()), "what color is this ?")),))
    batch = processor.encode_prompts([question])
    out = model.eval().generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] == batch["input_ids"].shape[1] + 3


SYSTEMS = {
    "BLIP-2": {"type": "qformer", "weights": "Salesforce/blip2-opt-2.7b"},
    "InstructBLIP": {"type": "qformer", "instruction": True, "tokenizer": "google-bert/bert-base-uncased"},
    "Flamingo": {"type": "perceiver_resampler", "time_frames": 8},
    "Qwen-VL": {"type": "perceiver_resampler", "latents": 256, "depth": 1, "dim": "language", "heads": 32}
    | {"head_dim": 128, "ff_mult": 0, "positions": "sincos", "project": True},
    "Oryx": {"type": "dynamic_compressor"},
    "CogVLM": {"type": "swiglu_mlp", "hidden_dim": 11008},
}
DEFAULTS = [
    name
    for name in CONNECTOR_BLOCKS.names()
    if not any(option.is_required() for option in CONNECTOR_BLOCKS.get(name).model_fields.values())
]


@pytest.mark.parametrize(
    "block",
    [*SYSTEMS.values(), *({"type": name} for name in DEFAULTS)],
    ids=[*SYSTEMS, *DEFAULTS],
)
def test_every_block_shrinks(block):
    small = shrink_block(block, "words")
    assert small.keys() >= block.keys()
    assert sum(p.numel() for p in parse_block(small).build(32, 32).parameters()) < 50_000
    assert small.get("tokenizer", "words") == "words"
    assert not small.get("weights")
