"""A run that shows its pictures larger from some stage on (Yi-VL, Qwen-VL)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model, load_model, set_image_size
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.train.planned import stage_of
from tests.train.runs import write_data


def test_yi_vl_sees_224_then_448_pixels() -> None:
    document = plan(load_recipe("recipes/yi_vl/6b.yaml"), ["640x480"], world=128)
    tokens = {name: stage_of(document, name)["visual_tokens"]["640x480"] for name in ("align", "detail", "instruct")}
    assert tokens == {"align": 256, "detail": 1024, "instruct": 1024}
    assert stage_of(document, "detail")["flops_per_step"] > stage_of(document, "align")["flops_per_step"]


def recipe(directory: Path, parts: dict[str, str], **sizes: int) -> Path:
    """Three stages, some of them with a size."""
    data = write_data(directory / "data", rows=12)
    common = {"trains": ["connector"], "data": ["toy"], "steps": 2, "batch": {"rows": 2, "workers": 0}}
    names = ("first", "second", "third")
    run = {
        "name": "sizes",
        "output": str(directory / "run"),
        "model": tiny.recipe_model(parts).model_dump(mode="json"),
        "data": {"toy": {"path": str(data), "format": "llava"}},
        "stages": {name: common | ({"image_size": sizes[name]} if name in sizes else {}) for name in names},
        "report_to": [],
    }
    file = directory / "recipe.json"
    file.write_text(json.dumps(run))
    return file


def test_a_stage_and_those_after_it_see_its_size(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    file = recipe(tmp_path, tiny_parts, second=48)
    train(file)
    sample = Sample((Message("user", (Media(MediaKind.IMAGE, tiny.picture()), "what is this ?")),))
    for name, side in (("first", 32), ("second", 48), ("third", 48)):
        model, processor = load_model(tmp_path / "run" / name)
        batch = processor.encode_prompts([sample])
        assert tuple(batch["pixel_values"].shape[-2:]) == (side, side)
        assert model.config.image_size == (None if side == 32 else side)
        tokens = int((batch["input_ids"] == processor.image_token_id).sum())
        assert tokens == processor.count_visual(MediaKind.IMAGE) == (side // 8) ** 2
        assert model(**batch).logits.isfinite().all()
    document = plan(load_recipe(file), ["64x64"])
    assert [stage["visual_tokens"]["64x64"] for stage in document["stages"]] == [16, 36, 36]


def test_weights_stay(tiny_parts: dict[str, str]) -> None:
    model, processor = build_model(tiny.recipe_model(tiny_parts))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = set_image_size(model, processor, 48)
    assert changed.image_spec.patch_grid == (6, 6) and processor.image_spec.patch_grid == (4, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_size_that_does_not_fit_is_named_at_its_line(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.second\.image_size: 50 pixels are not a multiple .* 48 or 56"):
        plan(load_recipe(recipe(tmp_path, tiny_parts, second=50)))
