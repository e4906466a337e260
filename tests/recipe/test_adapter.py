"""Adapters of a recipe: one section a type, faults at their lines, and stages that cannot follow one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsevlm.recipe.adapter import ADAPTERS, QLora
from sparsevlm.recipe.load import dump_recipe, load_recipe
from sparsevlm.recipe.reference import recipe_json_schema
from tests.adapters.specs import SPECS
from tests.recipe.example import faults
from tests.recipe.test_reference import complaints

Write = Callable[[str], Path]

RECIPE = """\
name: tiny
model:
  vision: {path: tower}
  language: {path: talker}
data:
  words: {path: words.json, format: llava}
stages:
  align:
    trains: [connector]
    data: [words]
    steps: 10
  tune:
    data: [words]
    steps: 20
    adapter:
      ADAPTER
"""


@pytest.mark.parametrize(
    "section",
    [section for case in SPECS for section in (case.section, case.sparse) if section is not None]
    + [QLora(type="qlora", double_quant=False), QLora(type="qlora", quantisation="fp4")],
    ids=lambda section: f"{section.type}-{getattr(section, 'quantisation', '')}",
)
def test_what_a_run_writes_down_can_be_read(section: Any, tmp_path: Path) -> None:
    """Processes of a run, and whoever continues it, read the recipe that the run wrote with every option."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("      ADAPTER\n", f"      {json.dumps(section.model_dump(mode='json'))}\n"))
    upcycled = any(target.startswith("moe.") for target in getattr(section, "targets", ()))
    if upcycled:
        file.write_text(file.read_text().replace("    steps: 10\n", "    steps: 10\n    upcycle: {}\n"))
    recipe = load_recipe(file)
    assert recipe.stages["tune"].adapter == section
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


AFTER = """\
  after:
    trains: [connector]
    data: [words]
    steps: 5
"""


def with_adapter(*lines: str) -> str:
    """The recipe with options of an adapter, the first on line 16, from column 7."""
    return RECIPE.replace("ADAPTER", "\n      ".join(lines))


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["type: mmma"], "16:13: stages.tune.adapter.type: "),
        (["r: 4"], "15:5: stages.tune.adapter: give its type: "),
        (["type: mma", "temprature: 5"], "17:7: stages.tune.adapter.temprature: "),
        (["type: mma", "targets: [q_proj]"], "17:7: stages.tune.adapter.targets: "),
        (["type: mma", "hidden: 0"], "17:15: stages.tune.adapter.hidden: "),
        (["type: mma", "temperature: 0"], "17:20: stages.tune.adapter.temperature: "),
        (["type: mma", "modalities: 4"], "17:19: stages.tune.adapter.modalities: "),
        (["type: mma", "hidden: 6", "groups: 4"], "18:15: stages.tune.adapter.groups: 4 groups do not divide"),
        (["type: mma", "layers: null", "vision_layers: null"], "17:7: stages.tune.adapter.layers: "),
        (["type: lora", "hidden: 8"], "17:7: stages.tune.adapter.hidden: "),
    ],
)
def test_what_is_wrong_with_an_adapter_is_told_at_its_line(write: Write, lines: list[str], fault: str) -> None:
    (told,) = faults(write(with_adapter(*lines)))
    assert told.startswith(f"x.yaml:{fault}")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["type: mmma"], "did you mean 'mma'?"),
        (["type: mma", "temprature: 5"], "did you mean 'temperature'?"),
        (["type: mma", "vision_layer: all"], "did you mean 'vision_layers'?"),
        (["type: lora", "rs_lora: true"], "did you mean 'rslora'?"),
    ],
)
def test_the_nearest_name_is_offered(write: Write, lines: list[str], words: str) -> None:
    (told,) = faults(write(with_adapter(*lines)))
    assert words in told


def test_a_missing_type_is_asked_for_with_all_there_are(write: Write) -> None:
    (told,) = faults(write(with_adapter("hidden: 8")))
    assert "type" in told and all(name in told for name in ADAPTERS)


@pytest.mark.parametrize("name", [name for name, section in ADAPTERS.items() if not section.mergeable])
def test_no_stage_follows_an_adapter_that_cannot_be_merged(write: Write, name: str) -> None:
    (told,) = faults(write(with_adapter(f"type: {name}") + AFTER))
    assert told.startswith("x.yaml:15:5: stages.tune.adapter: ")
    assert f"{name!r}" in told and "'after'" in told and "put this stage last" in told
    assert load_recipe(write(with_adapter(f"type: {name}"))).stages["tune"].adapter is not None


@pytest.mark.parametrize("name", [name for name, section in ADAPTERS.items() if section.mergeable])
def test_a_stage_follows_an_adapter_that_can(write: Write, name: str) -> None:
    assert list(load_recipe(write(with_adapter(f"type: {name}") + AFTER)).stages) == ["align", "tune", "after"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_trains_beside_is_the_connector(write: Write, name: str) -> None:
    stage = load_recipe(write(with_adapter(f"type: {name}"))).stages["tune"]
    assert stage.trains == ["adapter", "connector"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_editor_schema_knows_every_type_and_its_options(name: str) -> None:
    document = recipe_json_schema()
    stage: dict[str, Any] = {"data": ["a"], "steps": 1, "adapter": {"type": name}}
    recipe: dict[str, Any] = {
        "name": "x",
        "model": {"vision": {"path": "a"}, "language": {"path": "b"}},
        "data": {"a": {"path": "a.json", "format": "scenes"}},
        "stages": {"s": stage},
    }
    assert complaints(recipe, document, document) == []
    for wrong in ({"type": f"{name}x"}, {}, {"type": name, "no_such_option": 1}):
        assert complaints(recipe | {"stages": {"s": stage | {"adapter": wrong}}}, document, document), wrong
    described = document["$defs"][ADAPTERS[name].__name__]["properties"]
    assert described.keys() == ADAPTERS[name].model_fields.keys()
