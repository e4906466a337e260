"""Training with kept features: the losses of training without, over epochs, stages and interruptions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.feature_cache import CachingTrainer
from sparsevlm.train.launch import train
from sparsevlm.vision import encoder, feature_store
from tests import tiny
from tests.train.runs import metrics, write_recipe

STAGES = {
    name: {"trains": ["connector"], "data": ["toy"], "steps": 4, "log_every": 1, "save_every": 2, "optim": {"lr": 5e-3}}
    for name in ("first", "second")
}
BATCH = {"rows": 4, "rows_per_rank": 1, "workers": 0, "max_length": 64, "packing": True}


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The frames of each call of a tower in training."""
    seen: list[int] = []
    original = encoder.encode_frames

    def counting(tower: Any, pixels: Any, **options: Any) -> Any:
        seen.append(len(pixels))
        return original(tower, pixels, **options)

    monkeypatch.setattr("sparsevlm.model.visual.encode_frames", counting)
    return seen


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each entry at once, so that the next row finds it."""
    monkeypatch.setattr(feature_store, "_LEAST", 0)
    monkeypatch.setattr(feature_store, "_MOST", 0)


def recipe(directory: Path, parts: dict[str, str], cache: bool = True, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    names = changes.pop("names", STAGES)
    stages = {name: STAGES[name] | {"batch": BATCH} | changes.pop(name, {}) for name in names}
    options = {"feature_cache": {"path": str(directory.parent / "features")}} if cache else {}
    model = tiny.recipe_model(parts, **changes.pop("model", {})).model_dump(mode="json")
    return write_recipe(directory, parts, only=[], stages=stages, model=model, **options, **changes)


def losses(directory: Path) -> list[Any]:
    return [number for name in STAGES for line in metrics(directory / "run", name, "step", "loss") for number in line]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_losses_are_those_without(
    precision: str, tiny_parts: dict[str, str], tmp_path: Path, frames: list[int]
) -> None:
    both: dict[str, Any] = {"first": {"precision": precision}, "second": {"precision": precision}}
    train(recipe(tmp_path / "without", tiny_parts, cache=False, **both))
    plain = sum(frames)
    frames.clear()
    train(recipe(tmp_path / "with", tiny_parts, **both))
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)
    kept = sum(frames)
    assert kept < plain / 2
    frames.clear()
    train(recipe(tmp_path / "again", tiny_parts, **both))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)
    assert sum(frames) < kept  # nothing but the black pictures of rows of text


def test_a_stage_that_trains_its_tower_does_without(
    tiny_parts: dict[str, str], tmp_path: Path, frames: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(tmp_path / "run", tiny_parts, first={"trains": ["connector", "vision"]}))
    said = capsys.readouterr().err
    assert "first: the tower trains, so its features are not kept" in said
    assert "second: features of 0 media are in" in said  # a trained tower has features of its own


def test_other_towers_layers_and_sizes_read_nothing(
    tiny_parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(directory: str, parts: dict[str, str] = tiny_parts, **changes: Any) -> int:
        train(recipe(tmp_path / directory, parts, names=["first"], **changes))
        line = next(
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith("first: features of") and "were read" in line
        )
        return int(line.split()[3])

    assert read("a") > 0  # within the stage
    with_all = read("b")
    assert with_all > 0
    vision = {"path": tiny_parts["vision"], "layer": -1}
    for name, changes in {
        "layer": {"model": {"vision": vision}},
        "size": {"model": {"vision": {"image_size": 48}}},
    }.items():
        assert 0 < read(name, **changes) < with_all, name
    other = tiny.save_parts(tmp_path / "other")
    tower = AutoModel.from_pretrained(other["vision"])
    with torch.no_grad():
        next(tower.parameters())[0] += 1e-6  # of one weight of thousands
    tower.save_pretrained(other["vision"])
    assert 0 < read("tower", other) < with_all


@pytest.mark.slow
def test_a_changed_picture_is_another_one(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    train(recipe(tmp_path / "a", tiny_parts))
    before = losses(tmp_path / "a")
    tiny.picture("yellow").save(tmp_path / "a" / "data" / "red.png")
    file = recipe(tmp_path / "a", tiny_parts, output=str(tmp_path / "b" / "run"))
    train(file)
    plain = recipe(tmp_path / "a", tiny_parts, cache=False, output=str(tmp_path / "c" / "run"))
    train(plain)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "c"), rel=1e-6) != before


def test_an_interrupted_stage_goes_on(
    tiny_parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(tmp_path / "whole", tiny_parts, cache=False))
    steps = iter(range(40))
    original = CachingTrainer.compute_loss

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 11:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    file = recipe(tmp_path / "run", tiny_parts)
    with monkeypatch.context() as patched:
        patched.setattr(CachingTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(file)
    train(file)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_a_torn_shard_is_told_and_made_again(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    train(recipe(tmp_path / "a", tiny_parts))
    for shard in (tmp_path / "features").glob("*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-7])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(recipe(tmp_path / "b", tiny_parts))
    assert any("cannot be read" in str(warning.message) for warning in told)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-6)


def test_zero_3_is_refused_at_its_line(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.second\.sharding\.zero: ZeRO-3 shards the tower's weights"):
        load_recipe(recipe(tmp_path / "a", tiny_parts, second={"sharding": {"zero": 3}}))
    tower_trains = {"sharding": {"zero": 3}, "trains": ["vision", "connector"]}
    load_recipe(recipe(tmp_path / "b", tiny_parts, second=tower_trains))
