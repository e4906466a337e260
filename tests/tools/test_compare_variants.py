"""The comparison of ways to train: what it reads of finished stages, and that it can measure them again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsevlm.train.launch import train
from tests.train.test_adapter_stage import recipe_of
from tools import compare_variants


@pytest.fixture(scope="module")
def run(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with a whole model and an adapter, which was evaluated."""
    directory = tmp_path_factory.mktemp("variants")
    file = recipe_of(directory, tiny_parts, only=["align"], targets=["language"])
    recipe = json.loads(file.read_text())
    recipe["evals"] = {"seen": {"task": "scenes", "path": "sparsevlm:scenes", "limit": 8, "max_new_tokens": 2}}
    file.write_text(json.dumps(recipe))
    train(file)
    return directory / "run"


def table(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    monkeypatch.setattr("sys.argv", ["compare_variants.py", *argv])
    compare_variants.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_table_of_what_the_stages_say(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, adapter = table([f"full={run}/align", f"LoRA={run}/lora", "--steps", "0"], monkeypatch, capsys)
    assert [whole[0], adapter[0]] == ["full", "LoRA"]
    stage = json.loads((run / "lora" / "stage.json").read_text())
    trained = stage["summary"]["parameters"]["trainable"]
    assert adapter[2] == compare_variants.count(trained)
    assert adapter[5] == compare_variants.count((run / "lora" / "adapter_model.safetensors").stat().st_size) + "B"
    right = sum(kind["accuracy"] * kind["n"] for kind in stage["summary"]["eval"].values() if kind["core"])
    asked = sum(kind["n"] for kind in stage["summary"]["eval"].values() if kind["core"])
    assert adapter[1] == f"{right / asked:.1%}"


def test_an_unfinished_stage_is_refused(run: Path) -> None:
    with pytest.raises(SystemExit, match="expected NAME=RUN/STAGE"):
        compare_variants.parse_variant(f"x={run}/nothing")


@pytest.mark.slow
def test_it_measures_in_processes_of_their_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((*_, memory, seconds, _),) = table([f"LoRA={run}/lora", "--steps", "4", "--rounds", "1"], monkeypatch, capsys)
    assert 0.2 < float(memory.removesuffix(" GB")) < 8
    assert float(seconds) > 0
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["align", "lora"]
