"""Every shipped recipe, shrunken to tiny parts and data: two steps of each stage, generation, reloading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import dump_recipe, load_recipe
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.launch import train
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.data.media_files import write_video
from tests.train.runs import write_data

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml"))


def write_records(directory: Path) -> Path:
    """LLaVA-format rows: pictures, text alone and a clip."""
    file = write_data(directory, rows=12)
    write_video(directory / "clip.mp4", frames=4, fps=2)
    talk = [{"from": "human", "value": "<video>\nwhat moves ?"}, {"from": "gpt", "value": "a cat"}]
    records = json.loads(file.read_text()) + [
        {"id": f"v{i}", "video": "clip.mp4", "conversations": talk} for i in (0, 1)
    ]
    file.write_text(json.dumps(records))
    return file


def shrink(recipe: Recipe, parts: dict[str, str], records: Path) -> dict[str, Any]:
    """Keep the recipe's structure (connector, stages, what trains, mixture, schedule); make everything in it small."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    raw["output"], raw["report_to"], raw["evals"] = str(records.parent / "run"), [], {}
    vision = raw["model"]["vision"]
    raw["model"]["vision"] = {"path": parts["vision"]} | {
        k: vision[k] for k in ("layer", "select", "resize", "tiling") if k in vision
    }
    if isinstance(vision.get("layer"), list):
        raw["model"]["vision"]["layer"] = [1 + i % 2 for i in range(len(vision["layer"]))]
    elif vision.get("layer", -1) < -2:
        raw["model"]["vision"]["layer"] = -2
    raw["model"]["language"] = {"path": parts["language"], "chat_template": recipe.model.language.chat_template}
    raw["model"]["video"] = {"fps": None, "max_frames": 3}
    raw["data"] = {name: {"path": str(records), "format": "llava"} for name in raw["data"]}
    raw.pop("sharding", None)
    for stage in raw["stages"].values():
        for gone in ("epochs", "sharding", "save_every", "evals"):
            stage.pop(gone, None)
        stage["steps"] = 2
        packing = stage.get("batch", {}).get("packing", "auto")
        stage["batch"] = {"rows": 2, "rows_per_rank": 1, "max_length": 256, "workers": 0, "packing": packing}
        stage["log_every"] = 1
        stage.setdefault("optim", {})
        stage["optim"].pop("warmup", None)
    return raw


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
