"""Faults of a recipe's `hub` section."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevlm.recipe.load import RecipeError, load_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "at", "message"),
    [
        (["hub.repo=run"], "hub.repo", "expected OWNER/NAME"),
        (["hub.repo=me/run", "hub.license=My Licence"], "hub.license", "as the Hub spells it"),
        (["hub.repo=me/run", "hub.stages=[algin]"], "hub.stages.0", "did you mean 'align'"),
        (["hub.repo=me/run", "hub.evry=3"], "hub.evry", "did you mean 'every'"),
        (["hub.repo=me/run", "hub.every=0"], "hub.every", "1"),
        (["hub.repo=me/run", "hub.stages=[]"], "hub.stages", "may not be empty"),
        (["hub.private=false"], "hub.repo", "missing"),
    ],
)
def test_faults_of_the_section(overrides: list[str], at: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, overrides)
    assert [fault.path for fault in caught.value.faults] == [at]
    assert message in str(caught.value)


def test_a_stage_called_main_is_refused() -> None:
    override = "stages={main: {trains: [connector], data: [captions], steps: 1}}"
    with pytest.raises(RecipeError, match="cannot be called 'main'"):
        load_recipe(QUICKSTART, [override, "hub.repo=me/run"])
