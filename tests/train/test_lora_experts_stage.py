"""A stage with LoRA experts on an upcycled model: what it logs, leaves, shows and counts."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsevlm.eval.survey import print_survey
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.report.page import make_sections
from sparsevlm.report.read import read_run
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from tests.train.planned import stage_of
from tests.train.runs import metrics, write_recipe

ADAPTER = {"type": "lora_experts", "experts": 3, "top_k": 1, "r": 2, "aux_loss_coef": 0.5, "z_loss_coef": 0.01}


def recipe_of(directory: Path, parts: dict[str, str], **adapter: Any) -> Path:
    """Write a recipe whose stage `experts` follows the one that upcycles layer 1 of 2."""
    file = write_recipe(directory, parts, only=["moe"], stage={"steps": 1})
    recipe = json.loads(file.read_text())
    stage = {key: value for key, value in recipe["stages"]["moe"].items() if key not in ("trains", "upcycle")}
    recipe["stages"]["experts"] = stage | {"steps": 3, "gradient_checkpointing": True, "adapter": ADAPTER | adapter}
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture(scope="module")
def finished(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    torch.set_num_threads(1)
    train(recipe_of(directory, tiny_parts))
    return directory


def test_metrics_keep_the_groups_apart(finished: Path) -> None:
    rows = metrics(finished / "run", "experts", "lora_experts", "moe", "aux_loss", "z_loss")
    assert len(rows) == 3
    for mine, moe, aux, z in rows:
        assert {key for key in mine if key.startswith("layer_")} == {"layer_0"}
        assert {key for key in moe if key.startswith("layer_")} == {"layer_1"}
        assert [len(record["load"]["all"]) for record in (mine["layer_0"], moe["layer_1"])] == [3, 4]
        assert set(mine["layer_0"]["load"]) == {"all", "text", "image"} and mine["tokens"] == moe["tokens"]
        assert aux > 2.5 and z > 0  # about 1 of the LoRA experts and 2 of the MoE layer, which is balanced
    # B is zero in the first step: the additions have no direction yet, and then they have different ones.
    assert rows[-1][0]["layer_0"]["similarity"] < 0.999 < rows[-1][1]["layer_1"]["similarity"]


def test_routing_is_left_and_shown(finished: Path) -> None:
    stage = finished / "run" / "experts"
    document = json.loads((stage / "routing.json").read_text())
    assert (document["group"], document["layers"], document["num_experts"]) == ("lora_experts", [0], 3)
    (other,) = document["others"]
    assert (other["group"], other["layers"], other["num_experts"]) == ("moe", [1], 4)
    assert all((stage / entry["file"]).is_file() for entry in [*document["pictures"], *other["pictures"]])
    out = io.StringIO()
    print_survey(document, Console(file=out, width=120))
    assert "top 1 of 3 LoRA experts" in out.getvalue() and "top 2 of 4 experts" in out.getvalue()
    sections = {section.title: section for section in make_sections(read_run(finished / "run"))}
    assert {"Routing in experts (LoRA experts)", "Routing in experts", "Routing in moe"} <= set(sections)
    section = sections["Routing in experts (LoRA experts)"]
    assert "1 FFN with 3 LoRA experts, 1 for each token" in section.notes[0]
    names = [plot.name for each in sections.values() for plot in each.plots]
    assert len(names) == len(set(names)) and "experts_lora_experts_load" in names


def test_a_run_in_progress_is_shown_by_its_lines(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    shutil.copy(finished / "run" / "recipe.yaml", tmp_path)
    shutil.copy(finished / "run" / "experts" / "metrics.jsonl", tmp_path / "experts")
    (stage,) = read_run(tmp_path).stages
    assert stage.group == "lora_experts" and stage.experts_per_token == 1
    assert stage.live is not None and (stage.live.layers, stage.live.num_experts) == ([0], 3)
    (other,) = stage.others
    assert other.group == "moe" and other.live is not None and other.live.num_experts == 4


def test_the_plan_counts_what_the_stage_had(finished: Path) -> None:
    recipe = load_recipe(finished / "recipe.json")
    counted = stage_of(plan(recipe), "experts")["parameters"]
    (row,) = [row for row in json.loads((finished / "run" / "summary.json").read_text())["stages"]
              if row["name"] == "experts"]  # fmt: skip
    assert row["parameters"] == counted
    idle = 2 * 2 * 3 * (32 + 48)  # two of three experts of rank 2 on an FFN of 32 and 48
    parent = stage_of(plan(recipe), "moe")["parameters"]
    added = counted["total"] - parent["total"]
    assert added == 3 * 2 * 3 * (32 + 48) + 3 * 32
    assert counted["activated"] - parent["activated"] == added - idle


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"top_k": 4}, "top_k 4 is more than the 3 experts"),
        ({"router": {"init": "kmeans"}}, "'kmeans' is for upcycled experts"),
        ({"router": {"bias_update_rate": 0.1}}, "needs 'scoring: sigmoid'"),
        ({"layers": [0, 0]}, "layer 0 is named twice"),
        ({"layers": [1]}, "holds routed experts already"),
    ],
)
def test_faults(tiny_parts: dict[str, str], tmp_path: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe(recipe_of(tmp_path, tiny_parts, **adapter)))


def test_no_stage_follows_it(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    file = recipe_of(tmp_path, tiny_parts)
    recipe = json.loads(file.read_text())
    recipe["stages"]["more"] = recipe["stages"]["moe"] | {"trains": ["connector"], "upcycle": None}
    file.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="cannot be merged, so stage 'more' cannot start"):
        load_recipe(file)
