"""Markers: what counts, what is cleaned, what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevlm.train import checkpoints
from sparsevlm.train.callbacks import nest, read_metrics
from sparsevlm.train.fingerprint import changes, check_unchanged, stage_inputs
from sparsevlm.train.sharding import deepspeed_config, uses_deepspeed
from tests.train.toy import toy_recipe


def make(root: Path, step: int, complete: bool) -> Path:
    directory = root / f"checkpoint-{step}"
    (directory / "inner").mkdir(parents=True)
    (directory / "inner" / "weights").write_text("w")
    if complete:
        checkpoints.mark_complete(directory, {"step": step})
    return directory


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "nowhere") is None
    make(tmp_path, 9, False)
    assert checkpoints.latest(tmp_path) is None
    make(tmp_path, 10, True)
    make(tmp_path, 8, True)
    make(tmp_path, 100, False)
    (tmp_path / "other").mkdir()
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoints.read_marker(tmp_path / "checkpoint-10") == {"step": 10}
    assert [path.name for path in checkpoints.clean(tmp_path)] == ["checkpoint-9", "checkpoint-100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8", "other"]


def test_rotation_keeps_the_last_by_number(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        make(tmp_path, step, True)
    make(tmp_path, 7, False)
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20", "checkpoint-7"]


def test_a_deletion_that_is_cut_short_leaves_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path, 1, True)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(directory)
    assert (directory / "inner" / "weights").exists()
    assert checkpoints.latest(tmp_path) is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    checkpoints.write_atomically(file, "old")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_atomically(file, "new")
    assert file.read_text() == "old"


def test_metrics_nest_and_survive_a_torn_last_line(tmp_path: Path) -> None:
    assert nest({"loss": 1, "lr/a": 2, "lr/b": 3, "load/x/0": 4, "load/x/1": 5}) == {
        "loss": 1,
        "lr": {"a": 2, "b": 3},
        "load": {"x": [4, 5]},
    }
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]


def test_a_changed_option_is_named(parts: dict[str, str]) -> None:
    before = stage_inputs(toy_recipe(parts), "toy")
    check_unchanged(before, toy_recipe(parts), "toy", "RUN/toy")
    other = toy_recipe(parts, optim={"lr": 3e-4}, recipe={"seed": 5})
    with pytest.raises(ValueError) as error:
        check_unchanged(before, other, "toy", "RUN/toy")
    assert "seed: 0 -> 5" in str(error.value)
    assert "stages.toy.optim.lr: 0.01 -> 0.0003" in str(error.value)
    assert "Delete RUN/toy" in str(error.value)


def test_what_only_spreads_or_watches_the_work_may_change(parts: dict[str, str]) -> None:
    before = stage_inputs(toy_recipe(parts), "toy")
    same = toy_recipe(parts, log_every=7, save_every=3, sharding={"zero": 2}, batch={"workers": 1})
    check_unchanged(before, same, "toy", "RUN/toy")


def test_changes_lists_every_leaf() -> None:
    before, now = {"a": 1, "b": {"c": [1, 2], "d": 3}}, {"a": 1, "b": {"c": [1, 3]}, "e": None}
    assert changes(before, now) == ["b.c: [1, 2] -> [1, 3]", "b.d: 3 -> removed", "e: added None"]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeed_is_used_where_there_is_something_to_share(parts: dict[str, str], zero: int) -> None:
    recipe = toy_recipe(parts, recipe={"sharding": {"zero": zero}})
    stage = recipe.stages["toy"]
    assert not uses_deepspeed(recipe, stage, 1)
    assert uses_deepspeed(recipe, stage, 2)
    config = deepspeed_config(recipe.sharding, stage, "float32")
    assert config is not None
    assert config["zero_optimization"]["stage"] == zero
    assert config["zero_force_ds_cpu_optimizer"] is False
    offloaded = toy_recipe(parts, sharding={"zero": zero, "offload": "optimizer"})
    assert uses_deepspeed(offloaded, offloaded.stages["toy"], 1)


def test_deepspeed_precision_follows_recipe_and_dtype(parts: dict[str, str]) -> None:
    recipe = toy_recipe(parts, precision="bf16", sharding={"zero": 2})
    stage = recipe.stages["toy"]
    for dtype, pure in (("float32", False), ("bfloat16", True)):
        config = deepspeed_config(recipe.sharding_of(stage), stage, dtype)
        assert config is not None
        assert config["bf16"]["enabled"] is pure
        assert config["torch_autocast"]["enabled"] is not pure


def test_no_sharding_means_no_deepspeed(parts: dict[str, str]) -> None:
    recipe = toy_recipe(parts)
    assert not uses_deepspeed(recipe, recipe.stages["toy"], 8)
    assert deepspeed_config(recipe.sharding, recipe.stages["toy"], "float32") is None
