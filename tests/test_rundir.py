"""Which model a command's argument means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparsevlm.rundir import COMPLETE, choose_device, complete_stages, resolve_model


def make_stage(run: Path, name: str, age: int | None) -> Path:
    """A stage directory; ``age`` is the second of its marker, None leaves the stage unfinished."""
    stage = run / name
    stage.mkdir(parents=True)
    (stage / "config.json").write_text("{}")
    (stage / "stage.json").write_text("{}")
    if age is not None:
        (stage / COMPLETE).touch()
        os.utime(stage / COMPLETE, (age, age))
    return stage


def test_last_complete_stage_in_the_order_of_the_summary(tmp_path: Path) -> None:
    # alphabetical order, order of age and order of training all differ
    for name, age in (("moe", None), ("instruct", 5), ("align", 9)):
        make_stage(tmp_path, name, age)
    (tmp_path / "logs").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [{"name": "align"}, {"name": "instruct"}]}))
    assert [stage.name for stage in complete_stages(tmp_path)] == ["align", "instruct"]
    assert resolve_model(tmp_path) == str(tmp_path / "instruct")


def test_stages_that_the_summary_does_not_list_come_last_by_age(tmp_path: Path) -> None:
    for name, age in (("a", 30), ("b", 20), ("c", 10)):
        make_stage(tmp_path, name, age)
    assert [stage.name for stage in complete_stages(tmp_path)] == ["c", "b", "a"]
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [{"name": "a"}]}))
    assert [stage.name for stage in complete_stages(tmp_path)] == ["a", "c", "b"]


def test_a_stage_or_model_directory_is_itself(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "align", 1)
    assert resolve_model(stage) == str(stage)
    bare = tmp_path / "model"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert resolve_model(bare) == str(bare)


def test_hub_ids_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == "owner/name"


@pytest.mark.parametrize("argument", ["nowhere", "./owner/name", "a/b/c", "runs/nothing", "/absolute/name"])
def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no such run or model"):
        resolve_model(argument)


def test_unfinished_stages_are_refused(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "align", None)
    with pytest.raises(ValueError, match="not complete"):
        resolve_model(stage)
    with pytest.raises(ValueError, match="no complete stage and no model here \\(found: align\\)"):
        resolve_model(tmp_path)


def test_files_and_broken_summaries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("[1")
    with pytest.raises(ValueError, match="is a file"):
        resolve_model(path)
    with pytest.raises(ValueError, match="not a run summary"):
        resolve_model(tmp_path)


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used"):
            choose_device(name)
