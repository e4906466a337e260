"""Stages of an earlier version: options that it did not know, and that are at their defaults now, change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from sparsevlm.train.fingerprint import changes, check_unchanged, stage_inputs
from tests.train.toy import toy_recipe

ADAPTER = {"type": "lora", "r": 4}


def without(tree: Any, *paths: str) -> Any:
    """Take options out, as a version that did not know them would have written it."""
    for path in paths:
        *sections, option = path.split(".")
        node = tree
        for section in sections:
            node = node[int(section)] if isinstance(node, list) else node[section]
        del node[option]
    return tree


def test_an_option_that_was_not_there_is_no_difference_at_its_default(parts: dict[str, str]) -> None:
    recipe = toy_recipe(parts, adapter=ADAPTER, trains=["adapter"])
    gone = ("stage.adapter.experts", "stage.adapter.init", "stage.upcycle", "stage.optim.weight_decay", "model.video")
    check_unchanged(without(stage_inputs(recipe, "toy"), *gone), recipe, "toy", "RUN/toy")


def test_a_section_that_was_not_there_is_no_difference_where_it_is_not_used(parts: dict[str, str]) -> None:
    recipe = toy_recipe(parts)
    check_unchanged(without(stage_inputs(recipe, "toy"), "stage.adapter"), recipe, "toy", "RUN/toy")


@pytest.mark.parametrize(
    ("path", "now", "message"),
    [
        ("stage.adapter.init", {"adapter": ADAPTER | {"init": "olora"}, "trains": ["adapter"]}, "init: added 'olora'"),
        ("stage.adapter", {"adapter": ADAPTER, "trains": ["adapter"]}, "adapter: added {'type': 'lora'"),
        ("stage.optim.weight_decay", {"optim": {"lr": 1e-2, "weight_decay": 0.3}}, "weight_decay: added 0.3"),
    ],
)
def test_an_option_that_was_not_there_is_one_where_it_is_set(
    parts: dict[str, str], path: str, now: dict[str, Any], message: str
) -> None:
    recipe = toy_recipe(parts, **now)
    with pytest.raises(ValueError, match=message):
        check_unchanged(without(stage_inputs(recipe, "toy"), path), recipe, "toy", "RUN/toy")


def test_changes_in_lists_of_sections_are_found_in_the_section() -> None:
    before, now = {"list": [{"a": 1}, {"a": 2}]}, {"list": [{"a": 1, "b": 0}, {"a": 3, "b": 5}]}
    assert changes(before, now, {"list": [{"a": 1}, {"a": 3, "b": 5}]}) == ["list.1.a: 2 -> 3", "list.1.b: added 5"]
