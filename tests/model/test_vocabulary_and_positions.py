"""Tokens that a recipe adds, and positions that a stage stretches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevlm.model.build import build_model, load_model
from sparsevlm.model.positions import stretch_positions
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from tests import tiny
from tests.train.planned import recipe_of
from tests.train.runs import write_recipe

TOKENS = ["<box>", "</box>", "<ref>", "cat"]  # the tokenizer knows the last


def test_added_tokens_are_words_and_stay_in_answers(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    model, processor = build_model(tiny.recipe_model(tiny_parts, language={"extra_tokens": TOKENS}))
    tokenizer = processor.tokenizer
    plain, _ = build_model(tiny.recipe_model(tiny_parts))
    rows = [each.get_input_embeddings().weight.shape[0] for each in (model, plain)]
    assert rows[0] == max(rows[1], len(tokenizer)) == rows[1] + 3
    ids = tokenizer("what <ref>cat<box>(1,2)</box>", add_special_tokens=False)["input_ids"]
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in TOKENS] == [1, 1, 1, 1]
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    assert all(token in shown for token in TOKENS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].tokenizer("<box>", add_special_tokens=False)["input_ids"] == ids[3:4]
    document = plan(recipe_of(tiny_parts, model={"language": {"extra_tokens": TOKENS}}))
    total = document["stages"][0]["parameters"]["total"]
    assert total == sum(p.numel() for p in model.parameters())


def logits(model: Any, positions: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(7, 7 + positions.shape[-1])[None]
    mask = torch.ones_like(ids)  # without one, places that jump are taken for documents of a packed row
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions[None]).logits


def test_stretched_positions(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    model, processor = build_model(tiny.recipe_model(tiny_parts))
    places = torch.arange(12)
    before = logits(model, places)
    stretch_positions(model, 4.0)
    assert torch.equal(logits(model, places * 4), before)  # a power of two: exact
    assert (logits(model, places) - before).abs().max() > 1e-4  # measured: 9e-4
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    assert torch.equal(logits(again, places * 4), logits(model, places * 4))
    assert again.config.text_config.max_position_embeddings == 4 * 512
    stretch_positions(again, 2.0)
    assert torch.equal(logits(again, places * 8), before)


def test_a_stage_stretches_and_the_next_one_keeps_it(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    file = write_recipe(tmp_path, tiny_parts)
    raw = json.loads(file.read_text())
    stage = raw["stages"]["align"] | {"steps": 2}
    raw["stages"] = {"short": stage, "long": stage | {"rope_factor": 2}, "longer": stage}
    file.write_text(json.dumps(raw))
    train(file)
    lengths = [
        load_model(tmp_path / "run" / name)[0].config.text_config.max_position_embeddings for name in raw["stages"]
    ]
    assert lengths == [512, 1024, 1024]


def test_positions_that_are_learned_are_refused_at_their_line(tmp_path: Path) -> None:
    parts = tiny.save_parts(tmp_path / "parts", language="opt", ffn_dim=48, word_embed_proj_dim=32)
    file = write_recipe(tmp_path, parts, only=["align"], stage={"rope_factor": 2})
    with pytest.raises(RecipeError, match=r"stages\.align\.rope_factor: .*no rotary positions"):
        plan(load_recipe(file))
