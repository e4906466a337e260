"""Stages that train an adapter on quantised weights, from a recipe to what opens and follows them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsevlm.adapters.names import is_adapter_parameter, without_wrappers
from sparsevlm.adapters.quantise import quantised_bytes, replayed, settings_of
from sparsevlm.adapters.quantised_stack import QuantisedStack
from sparsevlm.adapters.saved import read_parent
from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from tests.train.runs import metrics
from tests.train.test_adapter_stage import logits_of, recipe_of
from tests.train.test_launch import COMPARED, killed, on_step

pytest.importorskip("bitsandbytes")
TARGETS = ["language.attention", "moe.experts"]


@pytest.fixture(scope="module")
def finished(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run whose adapter stage follows an upcycled model: bf16, packed, with gradient checkpointing."""
    directory = tmp_path_factory.mktemp("qlora")
    torch.set_num_threads(1)
    train(recipe_of(directory, tiny_parts, type="qlora", targets=TARGETS, stage={"precision": "bf16"}))
    return directory


def test_what_the_stage_leaves_opens_as_it_was_trained(finished: Path) -> None:
    stage = finished / "run" / "lora"
    record = read_parent(stage)["quantization"]
    assert record["kind"] == "nf4" and record["double"] and record["dtype"] == "float32"
    losses = [loss for (loss,) in metrics(finished / "run", "lora", "loss")]
    assert losses[-1] < losses[0]
    assert all(tensor.is_floating_point() for tensor in load_file(stage / "adapter_model.safetensors").values())
    model, processor = load_model(stage)
    again, _ = load_model(stage)
    assert torch.equal(logits_of(model, processor), logits_of(again, processor))
    settings = settings_of(model)
    assert settings is not None and list(settings.weights) == record["weights"]
    parent, _ = load_model(finished / "run" / "moe")
    stored = dict(parent.named_parameters())
    quantised = {without_wrappers(n): p for n, p in model.named_parameters() if quantised_bytes(p) is not None}
    assert set(quantised) == set(settings.weights)
    assert sum(isinstance(p, QuantisedStack) for p in quantised.values()) == 2
    for name, parameter in quantised.items():
        if isinstance(parameter, QuantisedStack):
            assert torch.equal(parameter.dequantise(), replayed(name, stored[name].detach(), settings))
    plain, _ = load_model(stage, quantised=False)
    assert settings_of(plain) is None
    for name, parameter in plain.named_parameters():
        if not is_adapter_parameter(name) and "connector" not in name:
            assert torch.equal(parameter, stored[without_wrappers(name)])


def test_the_plan_counts_what_the_stage_had(finished: Path) -> None:
    planned = next(s for s in plan(load_recipe(finished / "recipe.json"))["stages"] if s["name"] == "lora")
    trained = json.loads((finished / "run" / "lora" / "stage.json").read_text())["summary"]["parameters"]
    assert planned["parameters"] == trained
    model, _ = load_model(finished / "run" / "lora")
    sizes = [quantised_bytes(parameter) for parameter in model.parameters()]
    assert planned["memory"]["quantised"] == sum(size for size in sizes if size is not None)
    stacks = [p for p in model.parameters() if isinstance(p, QuantisedStack)]
    # LoRA adapts the stacks: the larger base, and with gradient checkpointing one layer's sums, in float32
    assert planned["memory"]["dequantised"] == 4 * (max(p.numel() for p in stacks) + sum(p.numel() for p in stacks))
    before = next(s for s in plan(load_recipe(finished / "recipe.json"))["stages"] if s["name"] == "moe")
    assert before["memory"]["quantised"] == before["memory"]["dequantised"] == 0


def test_a_killed_stage_continues_exactly_and_checkpoints_hold_no_quantised_weight(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "lora")
    for file in (tmp_path / "recipe.json", *(tmp_path / "run").glob("*/stage.json")):
        file.write_text(file.read_text().replace(str(finished), str(tmp_path)))
    assert killed(tmp_path / "recipe.json", on_step(5, "lora")) == signal.SIGKILL
    held = load_file(next((tmp_path / "run" / "lora" / "checkpoints").glob("checkpoint-*")) / "trainables.safetensors")
    assert any(is_adapter_parameter(name) for name in held)
    assert not any("self_attn" in name or "experts" in name for name in held if not is_adapter_parameter(name))
    train(tmp_path / "recipe.json")
    assert metrics(tmp_path / "run", "lora", *COMPARED) == metrics(finished / "run", "lora", *COMPARED)
    one, two = (load_file(d / "run" / "lora" / "adapter_model.safetensors") for d in (tmp_path, finished))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_next_stage_starts_from_the_adapter_merged_into_the_stored_weights(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "recipe.json", *(tmp_path / "run").glob("*/stage.json")):
        file.write_text(file.read_text().replace(str(finished), str(tmp_path)))
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    after = dict(recipe["stages"]["align"])
    recipe["stages"]["after"] = after | {"steps": 1, "optim": {"lr": 1e-12}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    train(tmp_path / "recipe.json")
    plain, processor = load_model(tmp_path / "run" / "lora", quantised=False)
    model, _ = load_model(tmp_path / "run" / "after")
    # float32, logits below 1: merging adds the same numbers in another order
    torch.testing.assert_close(logits_of(model, processor), logits_of(plain, processor), atol=2e-6, rtol=0)
    trained, _ = load_model(tmp_path / "run" / "lora")
    difference = (logits_of(trained, processor) - logits_of(plain, processor)).abs().max()
    assert 1e-4 < difference < 0.5  # of 4 bits


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ({"quantisation": "nf3"}, "adapter.quantisation", "did you mean 'nf4'"),
        ({"init": "orthogonal"}, "adapter.init", "not quantised"),
        ({"quantisation": "int8", "double_quant": True}, "adapter.double_quant", "leave it out with int8"),
        ({"quantise": ["language", "language"]}, "adapter.quantise.1", "named twice"),
        ({"quantise": ["connector"], "stage": {"trains": ["adapter", "connector"]}}, "trains.1", "is quantised"),
        ({"dora": True}, "adapter", "no multiple of 64 wide"),
        ({"stage": {"sharding": {"zero": 3}}}, "adapter", "zero: 2"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_line(
    tiny_parts: dict[str, str], tmp_path: Path, options: dict[str, Any], where: str, message: str
) -> None:
    file = recipe_of(tmp_path, tiny_parts, only=["align"], type="qlora", **options)
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(file))
    faults = [fault for fault in caught.value.faults if fault.path.startswith(f"stages.lora.{where}")]
    assert any(message in fault.message for fault in faults), caught.value


def test_a_quantised_connector_is_left_alone(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, tiny_parts, only=["align"], type="qlora", quantise=["connector"]))
    assert recipe.stages["lora"].trains == ["adapter"]


def test_an_uploaded_adapter_says_how_its_base_is_quantised(finished: Path) -> None:
    from sparsevlm.export.hub_adapter import Base, adapter_files
    from sparsevlm.export.hub_files import read_source

    stage = finished / "run" / "lora"
    files = adapter_files(read_source(stage), Base("me/base", "main"))
    assert json.loads(files["parent.json"])["quantization"] == read_parent(stage)["quantization"]
