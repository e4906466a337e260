"""The generated reference and editor schema: current, complete, and in agreement with the loader."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sparsevlm.recipe.reference import recipe_json_schema, recipe_reference, sections
from sparsevlm.registry import CONNECTOR_BLOCKS, DATA_FORMATS, EVAL_TASKS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def generate(*arguments: str) -> int:
    return runpy.run_path(str(ROOT / "tools" / "generate_docs.py"))["main"](list(arguments))


def test_committed_files_are_current(capsys):
    assert generate("--check") == 0, capsys.readouterr().err


def test_check_notices_stale_files(tmp_path):
    root = ["--root", str(tmp_path)]
    assert generate("--check", *root) == 1
    assert generate(*root) == 0
    assert generate("--check", *root) == 0
    page = tmp_path / "docs" / "recipes.md"
    page.write_text(page.read_text() + "\n")
    assert generate("--check", *root) == 1


def test_every_option_is_described():
    page = recipe_reference()
    entries = [
        *sections(),
        *(block for _, block in CONNECTOR_BLOCKS.items()),
        *(task for _, task in EVAL_TASKS.items()),
    ]
    for section in entries:
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
            assert f"| `{name}` |" in page or name == "type"
    for name, form in DATA_FORMATS.items():
        assert f"### `format: {name}`" in page
        for option in form.defaults:
            assert f"| `{option}` |" in page


def complaints(value: Any, rule: dict, root: dict) -> list[str]:
    """Check a value against the parts of JSON schema that ours uses."""
    if "$ref" in rule:
        target: Any = root
        for part in rule["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return complaints(value, target, root)
    for word, wanted in (("anyOf", range(1, 99)), ("oneOf", [1])):
        if word in rule and sum(not complaints(value, option, root) for option in rule[word]) not in wanted:
            return [f"{value!r}: not {word}"]
    if ("enum" in rule and value not in rule["enum"]) or ("const" in rule and value != rule["const"]):
        return [f"{value!r}: not allowed"]
    if "not" in rule and not complaints(value, rule["not"], root):
        return [f"{value!r}: forbidden"]
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = rule.get("type")
    if (kind == "null" and value is not None) or (kind in types and not isinstance(value, types[kind])):
        return [f"{value!r}: no {kind}"]
    found = []
    if isinstance(value, dict):
        found += [f"missing {name}" for name in rule.get("required", []) if name not in value]
        for name, inner in value.items():
            extra = rule.get("additionalProperties", True)
            if name in rule.get("properties", {}):
                found += complaints(inner, rule["properties"][name], root)
            elif extra is False:
                found.append(f"unknown {name}")
            elif isinstance(extra, dict):
                found += complaints(inner, extra, root)
    if isinstance(value, list) and "items" in rule:
        found += [fault for item in value for fault in complaints(item, rule["items"], root)]
    if "if" in rule and not complaints(value, rule["if"], root):
        found += complaints(value, rule["then"], root)
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipes_fit_the_editor_schema(path):
    document = json.loads((ROOT / "recipes" / "schema.json").read_text())
    values = YAML(typ="safe", pure=True).load(path.read_text())
    assert complaints(values, document, document) == []


def test_editor_schema_knows_blocks_formats_and_names():
    document = recipe_json_schema()
    recipe: dict[str, Any] = {
        "name": "x",
        "model": {"vision": {"path": "a"}, "language": {"path": "b"}, "connector": [{"type": "mlp", "depth": 2}]},
        "data": {"a": {"path": "a.json", "format": "scenes"}},
        "stages": {"s": {"trains": ["connector"], "data": ["a"], "steps": 1}},
    }
    assert complaints(recipe, document, document) == []
    assert complaints({"base": "x.yaml", "stages": {"s": None}}, document, document) == []
    assert complaints({**recipe, "sead": 1}, document, document) == ["unknown sead"]
    assert complaints({"name": "x"}, document, document) == ["missing model", "missing data", "missing stages"]
    for section, change in {
        "model": {"vision": {"path": "a"}, "language": {"path": "b"}, "connector": [{"type": "mlp", "depht": 2}]},
        "data": {"a": {"path": "a.json", "format": "scene"}},
        "stages": {"s": {"trains": ["everything"], "data": ["a"], "steps": 1}},
    }.items():
        assert complaints({**recipe, section: change}, document, document), section
