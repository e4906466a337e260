"""A recipe with two towers side by side has all that one tower has: planned, trained, adapted, saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from sparsevlm.adapters.targets import resolve_targets
from sparsevlm.export.target import NoHomeError
from sparsevlm.export.vlm import llava_config
from sparsevlm.model.build import build_model, load_model
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from sparsevlm.vision.encoder import encode_frames
from tests import tiny
from tests.train.planned import recipe_of, stage_of
from tests.train.runs import metrics, write_recipe


@pytest.fixture(scope="session")
def two(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section `vision` with the tiny CLIP and a DINOv2 beside it."""
    path = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    AutoModel.from_config(tiny.vision_config("dinov2", hidden_size=24)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return {"path": tiny_parts["vision"], "layer": -2, "beside": [{"path": str(path), "layer": [-2, -1]}]}


def test_weights_and_colours_are_those_of_the_parts(tiny_parts: dict[str, str], two: dict[str, Any]) -> None:
    model, processor = build_model(tiny.recipe_model(tiny_parts, vision=two))
    tower = model.model.vision_tower
    alone = AutoModel.from_pretrained(two["beside"][0]["path"]).eval()
    ours = tower.towers[1].state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in alone.state_dict().items())
    assert tower.config.means[1] == [0.4] * 3 and tower.config.stds[1] == [0.2] * 3
    assert list(processor.image_spec.mean) == tower.config.means[0]
    pixels = torch.randn(1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tower.config.means[0], tower.config.stds[0]))
    its_own = (pixels * std + mean - 0.4) / 0.2
    want = encode_frames(alone, its_own, [-2, -1])
    torch.testing.assert_close(encode_frames(tower, pixels)[..., 32:], want, rtol=0, atol=5e-6)


def test_plan_counts_both(tiny_parts: dict[str, str], two: dict[str, Any]) -> None:
    alone, both = (
        stage_of(plan(recipe_of(tiny_parts, model={"vision": vision}), ["32x32"]), "align")
        for vision in ({"path": two["path"], "layer": -2}, two)
    )
    assert both["visual_tokens"] == alone["visual_tokens"] == {"32x32": 16}
    dino = AutoModel.from_pretrained(two["beside"][0]["path"])
    more = sum(weight.numel() for weight in dino.parameters()) + 2 * 24 * 32  # and the connector's wider first matrix
    assert both["parameters"]["total"] - alone["parameters"]["total"] == more
    assert both["flops_per_step"] > alone["flops_per_step"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"beside": [{"path": "TOWER", "image_size": 16}]}, r"model\.vision\.beside: .* one grid, got clip_vision_"),
        ({"beside": [{"path": "TOWER", "image_size": 20}]}, r"beside\.0\.image_size: 20 pixels are not a multiple"),
        ({"beside": [{"path": "TOWER", "layer": 9}]}, r"beside\.0\.layer: .* has 3 hidden states"),
        ({"beside": [{"path": "nowhere/such-tower"}]}, r"beside\.0\.path: .*nowhere/such-tower"),
    ],
)
def test_faults_name_the_tower(
    tiny_parts: dict[str, str], two: dict[str, Any], change: dict[str, Any], fault: str
) -> None:
    towers = [each | {"path": each["path"].replace("TOWER", two["beside"][0]["path"])} for each in change["beside"]]
    with pytest.raises(RecipeError, match=fault):
        plan(recipe_of(tiny_parts, model={"vision": two | {"beside": towers}}))


def test_options_that_need_one_tower_are_refused(tiny_parts: dict[str, str], two: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no counterpart in another tower"):
        tiny.recipe_model(tiny_parts, vision=two | {"select": "full"})
    with pytest.raises(ValueError, match="towers side by side see squares"):
        native = {"resize": "native", "native": {"image": {"type": "smart", "max_pixels": 1000}}}
        tiny.recipe_model(tiny_parts, vision=two | native)


def test_adapters_find_the_layers_that_are_read(tiny_parts: dict[str, str], two: dict[str, Any]) -> None:
    """CLIP's last layer is not read (layer -2), DINOv2's is."""
    model, _ = build_model(tiny.recipe_model(tiny_parts, vision=two))
    found = resolve_targets(model, ["vision.attention"]).modules
    layers = {(name.split(".")[3], name.partition(".layers." if name.split(".")[3] == "0" else ".layer.")[2][0])
              for name in found}  # fmt: skip
    assert layers == {("0", "0"), ("1", "0"), ("1", "1")}


def test_it_trains_adapts_saves_and_has_no_home_in_llava(
    tiny_parts: dict[str, str], two: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.recipe_model(tiny_parts, vision=two).model_dump(mode="json")
    file = write_recipe(tmp_path, tiny_parts, model=model)
    raw = json.loads(file.read_text())
    raw["stages"]["align"]["trains"] = ["connector", "vision"]
    common = {key: value for key, value in raw["stages"]["align"].items() if key != "trains"}
    lora = {"type": "lora", "r": 2, "targets": ["vision.attention", "language.attention"]}
    raw["stages"] = {"align": raw["stages"]["align"], "lora": common | {"adapter": lora}}
    file.write_text(json.dumps(raw))
    train(file)
    losses = [loss for (loss,) in metrics(tmp_path / "run", "align", "loss") if loss is not None]
    assert losses[-1] < losses[0]
    before, processor = build_model(load_recipe(file).model)
    trained, _ = load_model(tmp_path / "run" / "align")
    for index in (0, 1):  # both towers trained
        old, new = (dict(m.model.vision_tower.towers[index].named_parameters()) for m in (before, trained))
        assert any(not torch.equal(old[name], weight) for name, weight in new.items())
    adapted, _ = load_model(tmp_path / "run" / "lora")
    assert any("lora_A" in name and ".towers.1." in name for name, _ in adapted.named_parameters())
    with pytest.raises(NoHomeError, match="sparsevlm_towers"):
        llava_config(trained.config, processor.image_spec.tiling)
