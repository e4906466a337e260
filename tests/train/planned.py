"""Recipes over the tiny parts to plan."""

from sparsevlm.recipe.schema import Recipe
from tests import tiny


def stage_of(document: dict, name: str) -> dict:
    return next(stage for stage in document["stages"] if stage["name"] == name)


def recipe_of(tiny_parts, **changes) -> Recipe:
    model = tiny.recipe_model(tiny_parts, **changes.pop("model", {})).model_dump()
    stage = {"data": ["a"], "steps": 3, "batch": {"rows": 4, "rows_per_rank": 2, "max_length": 64, "packing": False}}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": model,
            "data": {"a": {"path": "sparsevlm:scenes", "format": "scenes"}},
            "stages": {
                "align": {**stage, "trains": ["connector"]},
                "instruct": {**stage, "trains": ["connector", "language"], "optim": {"part_lr": {"language": 1e-5}}},
                "moe": {**stage, "trains": ["moe"], "upcycle": {}},
            },
            **changes,
        }
    )
