"""Overrides, and the way back to YAML."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.recipe.load import dump_recipe, load_recipe
from sparsevlm.recipe.schema import Recipe
from tests.recipe.example import GOOD, faults

# -- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_at_dotted_paths(write):
    recipe = load_recipe(
        write(GOOD),
        [
            "stages.moe.optim.lr=1e-5",
            "model.connector.1.depth=3",
            "stages.align.data=[words, clips]",
            "output=out=put",
            "data.more={path: m.json, format: llava}",
            "model.vision.layer=-2",
            "stages.moe.upcycle.layers=[0, 2]",
        ],
    )
    assert recipe.stages["moe"].optim.lr == 1e-5
    assert recipe.model.connector[1]["depth"] == 3
    assert recipe.stages["align"].data == ["words", "clips"]
    assert recipe.output == "out=put"
    assert "more" in recipe.data
    assert recipe.model.vision.layer == -2
    assert recipe.stages["moe"].upcycle.layers == [0, 2]


def test_an_override_replaces_and_null_removes(write):
    path = write(GOOD)
    assert load_recipe(path, ["stages.align.optim={warmup: 2}"]).stages["align"].optim.lr == 1e-4
    assert list(load_recipe(path, ["stages.moe=null"]).stages) == ["align"]
    assert load_recipe(path, ["model.connector.1.depth=null"]).model.connector[1] == {"type": "mlp"}
    assert load_recipe(path, ["model.video.fps=null"]).model.video.fps is None


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.moe.optm.lr=1", "override stages.moe.optm.lr: stages.moe.optm: unknown option, did you mean 'optim'?"),
        (
            "stages.meo.optim.lr=1",
            "override stages.meo.optim.lr: no 'meo' in stages, did you mean 'moe'? (there: align, moe)",
        ),
        (
            "stages.moe.optim.lr=quick",
            "override stages.moe.optim.lr: stages.moe.optim.lr: expected a number, got 'quick'",
        ),
        (
            "model.connector.1.depht=3",
            "override model.connector.1.depht: model.connector.1.depht: unknown option, did you mean 'depth'?",
        ),
        (
            "model.connector.2.depth=3",
            "override model.connector.2.depth: model.connector is a list of 2, it has no item 2",
        ),
        ("name.first=x", "override name.first: name is 'tiny', it has no option 'first'"),
        ("stages.moe.steps=[1", "override stages.moe.steps: broken YAML"),
        ("steps", "override steps: expected dotted.path=value"),
        ("stages..moe=1", "override stages..moe: expected dotted.path=value"),
        ("base=x.yaml", "override base: a base cannot be chosen by an override"),
        ("report_to.0=tensorboard", "override report_to.0: report_to is not in the recipe, so it has no item 0"),
    ],
)
def test_override_faults_name_the_override(write, override, fault):
    found = faults(write(GOOD), override)
    assert len(found) == 1 and found[0].startswith(fault), found


def test_faults_of_files_and_overrides_come_together(write):
    found = faults(write(GOOD.replace("seed", "sead") + "sead: 1\n"), "stages.meo.optim.lr=1", "stages.moe.stps=1")
    assert [line.split(": ")[0] for line in found] == [
        "override stages.meo.optim.lr",
        "override stages.moe.stps",
        "x.yaml:23:1",
    ]


# -- and back ---------------------------------------------------------------------------------------------------------


def test_dump_loads_back_equal(write):
    recipe = load_recipe(write(GOOD), ["model.vision.mean=[0.5, 0.25, 1e-3]", "data.words.license='1e-4'"])
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert again == recipe
    assert list(again.stages) == list(recipe.stages)


_text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co")), max_size=12)


@settings(max_examples=50, deadline=None)
@given(
    path=_text,
    split=st.sampled_from(
        ["yes", "null", "1e-4", "0x1F", "2026-01-01", "~", "- a", "a: b", "#x", "'", '"', " ", "\n", "<<"]
    ),
    lr=st.floats(min_value=1e-30, max_value=1e30),
    columns=st.fixed_dictionaries({"id": _text}),
)
def test_dump_loads_back_equal_whatever_the_values(tmp_path_factory, path, split, lr, columns):
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"vision": {"path": path}, "language": {"path": split}},
            "data": {"a": {"path": [path, split], "format": "llava", "split": split}},
            "stages": {"s": {"trains": ["connector"], "data": ["a"], "epochs": 0.5, "optim": {"lr": lr}}},
            "evals": {
                "e": {"task": "vqa", "path": path, "options": {"prompt": split + "{question}", "columns": columns}}
            },
        }
    )
    file = tmp_path_factory.mktemp("dump") / "r.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
