"""Stages whose LoRA starts from the model and from samples: what is printed, kept, continued and left."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from sparsevlm.adapters.saved import find_parent, read_parent, weights_hash
from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.adapter_start import FILE, read_adapter_start, save_adapter_start
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from tests.train.runs import metrics
from tests.train.test_adapter_stage import logits_of, recipe_of, without_lora
from tests.train.test_launch import COMPARED, killed, on_step


@pytest.mark.slow
def test_a_killed_stage_continues_from_the_numbers_it_began_with(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    train(recipe_of(whole, tiny_parts, only=["align"], init="corda", targets=["language.attention", "vision"]))
    stage = whole / "run" / "lora"
    assert not (stage / "checkpoints").exists()
    assert find_parent(stage).resolve() == (whole / "run" / "align").resolve()
    assert read_parent(stage)["sha256"] == weights_hash(whole / "run" / "align")
    assert json.loads((stage / "adapter_config.json").read_text())["r"] == 8
    recipe = without_lora(whole, again)
    assert killed(recipe, on_step(5, "lora")) == signal.SIGKILL
    start = again / "run" / "lora" / "checkpoints" / FILE
    kept = start.read_bytes()
    start.unlink()
    with pytest.raises(ValueError, match=f"not {FILE} that they began with"):
        train(recipe)
    start.write_bytes(kept)
    train(recipe)
    assert metrics(again / "run", "lora", *COMPARED) == metrics(whole / "run", "lora", *COMPARED)
    one, two = (load_file(d / "run" / "lora" / "adapter_model.safetensors") for d in (whole, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    model, processor = load_model(stage)
    parent, _ = load_model(whole / "run" / "align")
    assert not torch.allclose(logits_of(model, processor), logits_of(parent, processor), atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_the_start_is_made_once_and_says_how_far_the_model_is_from_its_parent(
    tiny_model: Any, tiny_parts: dict[str, str], tmp_path: Path, init: str
) -> None:
    model, processor = tiny_model
    model.save_pretrained(tmp_path / "parent")
    processor.save_pretrained(tmp_path / "parent")
    recipe = load_recipe(recipe_of(tmp_path, tiny_parts, only=["align"], init=init))
    console = Console(record=True, width=200)
    root = tmp_path / "checkpoints"
    save_adapter_start(recipe, "lora", tmp_path / "parent", root, console)
    said = console.export_text()
    assert f"the adapter starts from {init}; logits differ from the parent's by" in said
    assert float(said.split(" by ")[1].split()[0]) < 2e-6  # float32, logits below 1
    first = load_file(root / FILE)
    save_adapter_start(recipe, "lora", tmp_path / "parent", root, console)
    assert not console.export_text()  # what is there fits
    (root / FILE).unlink()
    save_adapter_start(recipe, "lora", tmp_path / "parent", root, console)
    start = read_adapter_start(recipe, "lora", root)
    assert start is not None
    assert start.keys() == first.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in start.items())
    assert {len(tensor) for name, tensor in start.items() if name.endswith("lora_A")} == {4}


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ({"init": "pissa", "targets": ["q_proj"], "r": 40}, "adapter", "r is 40"),
        ({"init": "pisa"}, "adapter.init", "did you mean 'pissa'"),
        ({"init": "olora", "pissa_iterations": 4}, "adapter.pissa_iterations", "only 'init: pissa'"),
        ({"experts": [0]}, "adapter.experts", "add 'moe.experts'"),
        ({"experts": [0, 1, 0], "targets": ["moe.experts"]}, "adapter.experts.2", "named twice"),
        (
            {"experts": [0, 4], "targets": ["moe.experts"], "stage": {"upcycle": {"layers": [1]}}},
            "adapter",
            "names expert 4, but the stacks have 4",
        ),
        ({"stage": {"scoring": "sigmoid"}}, "scoring", "it belongs to 'stages.lora.upcycle.router'"),
        ({"stage": {"lr": 1e-3}}, "lr", "it belongs to 'stages.lora.optim'"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_line(
    tiny_parts: dict[str, str], tmp_path: Path, options: dict[str, Any], where: str, message: str
) -> None:
    file = recipe_of(tmp_path, tiny_parts, only=["align"], **options)
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(file))
    faults = [fault for fault in caught.value.faults if fault.path == f"stages.lora.{where}"]
    assert any(message in fault.message for fault in faults), caught.value
