"""Stages that train an adapter: what they leave, what opens it, what is refused, how a killed one goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsevlm.adapters.attach import attach
from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.adapters.saved import find_parent, read_parent
from sparsevlm.model.build import load_model
from sparsevlm.recipe.adapter import Lora
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.rundir import COMPLETE, resolve_model
from sparsevlm.train.launch import train
from sparsevlm.train.parts import parameter_groups, select_trainable
from sparsevlm.train.plan import plan
from sparsevlm.train.stage import _float16
from tests.train.runs import metrics, write_recipe
from tests.train.test_launch import COMPARED, killed, on_step

ALL = ["language.attention", "language.ffn", "vision", "moe.experts", "moe.router"]


def recipe_of(directory: Path, parts: dict[str, str], only: Any = ("align", "moe"), **lora: Any) -> Path:
    """Write a recipe with a stage `lora` after those in `only`."""
    file = write_recipe(directory, parts, only=list(only), stage={"steps": 2})
    recipe = json.loads(file.read_text())
    stage = dict(next(iter(recipe["stages"].values())))
    for key in ("trains", "upcycle"):
        stage.pop(key, None)
    extra = lora.pop("stage", {})
    adapter = {"type": "lora", "r": 4, **lora}
    recipe["stages"]["lora"] = stage | {"steps": 6, "gradient_checkpointing": True, "adapter": adapter} | extra
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture(scope="module")
def finished(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run whose adapter stage follows an upcycled model, packed and with gradient checkpointing."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.set_num_threads(1)
    train(recipe_of(directory, tiny_parts, targets=ALL))
    return directory


def without_lora(finished: Path, directory: Path) -> Path:
    """Copy the run without its adapter stage, and return the recipe of the copy."""
    shutil.copytree(finished, directory, dirs_exist_ok=True)
    shutil.rmtree(directory / "run" / "lora")
    for file in (directory / "recipe.json", *(directory / "run").glob("*/stage.json")):
        file.write_text(file.read_text().replace(str(finished), str(directory)))
    return directory / "recipe.json"


def inputs_of(processor: Any) -> dict[str, Any]:
    """A question with a picture, as the model takes it."""
    from sparsevlm.data.collate import Collator
    from tests.train.toy import toy_sample

    batch = Collator(processor.tokenizer.pad_token_id, packed=False)([[processor.encode(toy_sample(1))]])
    return {key: value for key, value in batch.items() if key not in ("labels", "sample_ids", "rows")}


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_of(processor)).logits


def test_the_stage_leaves_an_adapter_its_parent_and_no_second_model(finished: Path) -> None:
    stage = finished / "run" / "lora"
    there = {file.name for file in stage.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "parent.json", COMPLETE, "stage.json"} <= there
    assert {"processor_config.json", "tokenizer.json"} <= there
    assert not there & {"config.json", "model.safetensors", "checkpoints", "base", "start"}
    assert find_parent(stage) == stage / read_parent(stage)["relative"]
    assert find_parent(stage).resolve() == (finished / "run" / "moe").resolve()
    keys = set(load_file(stage / "adapter_model.safetensors"))
    assert all(key.startswith("base_model.model.") for key in keys)
    assert any("connector" in key for key in keys)
    losses = [loss for (loss,) in metrics(finished / "run", "lora", "loss")]
    assert losses[-1] < losses[0]


def test_load_model_gives_parent_plus_adapter(finished: Path) -> None:
    stage = finished / "run" / "lora"
    model, processor = load_model(resolve_model(finished / "run"))
    weights = dict(model.named_parameters())
    for name, saved in load_file(stage / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace("lora_A.", "lora_A.default.")
        assert torch.equal(weights[name.replace("lora_B.", "lora_B.default.")], saved)
    parent, _ = load_model(finished / "run" / "moe")
    assert not torch.equal(logits_of(model, processor), logits_of(parent, processor))
    for name, weight in parent.named_parameters():  # frozen weights are the parent's, bit for bit
        kept = [w for n, w in weights.items() if n.replace(".base_layer", "") == name and not is_adapter_parameter(n)]
        assert len(kept) == 1
        assert torch.equal(kept[0], weight) == (not name.startswith("model.connector."))


def test_peft_alone_loads_it_and_gives_the_same_logits(finished: Path, tmp_path: Path) -> None:
    """PEFT gets the base as an object; on the side of the adapter nothing of ours takes part."""
    stage = finished / "run" / "lora"
    model, processor = load_model(stage)
    torch.save({"inputs": inputs_of(processor), "logits": logits_of(model, processor)}, tmp_path / "want.pt")
    code = f"""
import torch
from sparsevlm.model.build import load_model
from peft import PeftModel
torch.set_num_threads(1)
base, _ = load_model({str(finished / "run" / "moe")!r})
model = PeftModel.from_pretrained(base, {str(stage)!r}).eval()
want = torch.load({str(tmp_path / "want.pt")!r}, weights_only=False)
with torch.no_grad():
    got = model(**want["inputs"]).logits
assert torch.equal(got, want["logits"]), (got - want["logits"]).abs().max()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_another_parent_is_refused_and_a_moved_run_is_found(finished: Path, tmp_path: Path) -> None:
    stage = finished / "run" / "lora"
    with pytest.raises(ValueError, match="trained on other weights"):
        load_model(stage, base=finished / "run" / "align")
    with pytest.raises(ValueError, match="holds an adapter itself"):
        load_model(stage, base=stage)
    with pytest.raises(ValueError, match="only an adapter"):
        load_model(finished / "run" / "moe", base=finished / "run" / "align")
    moved = tmp_path / "moved"
    shutil.copytree(finished / "run", moved)
    record = json.loads((moved / "lora" / "parent.json").read_text()) | {"path": str(tmp_path / "gone")}
    (moved / "lora" / "parent.json").write_text(json.dumps(record))
    assert find_parent(moved / "lora").resolve() == (moved / "moe").resolve()
    shutil.rmtree(moved / "moe")
    with pytest.raises(ValueError, match="pass the directory"):
        load_model(moved / "lora")
    load_model(moved / "lora", base=finished / "run" / "moe")


def test_a_trained_change_of_the_parent_is_seen(finished: Path, tmp_path: Path) -> None:
    """Same names, shapes and file size, other numbers: a hash of names and shapes alone would not tell."""
    changed = tmp_path / "moe"
    model, _ = load_model(finished / "run" / "moe")
    model.model.language_model.layers[1].mlp.gate.weight.data += 1e-3
    model.save_pretrained(changed)
    size = "model.safetensors"
    assert (changed / size).stat().st_size == (finished / "run" / "moe" / size).stat().st_size
    with pytest.raises(ValueError, match="trained on other weights"):
        find_parent(finished / "run" / "lora", changed)


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_adapter_stage_continues_exactly(
    tiny_parts: dict[str, str], finished: Path, tmp_path: Path, step: int
) -> None:
    recipe = without_lora(finished, tmp_path)
    assert killed(recipe, on_step(step, "lora")) == signal.SIGKILL
    checkpoints = sorted((tmp_path / "run" / "lora" / "checkpoints").glob("checkpoint-*/COMPLETE"))
    assert bool(checkpoints) == (step > 2)
    if checkpoints:  # adapter and connector are in every checkpoint, and whose adapter it is
        held = set(load_file(checkpoints[-1].parent / "trainables.safetensors"))
        assert any(is_adapter_parameter(name) for name in held)
        assert any(name.startswith("model.connector.") for name in held)
        parent = read_parent(finished / "run" / "lora")["sha256"]
        assert json.loads(checkpoints[-1].read_text())["parent"] == parent
    train(recipe)
    assert metrics(tmp_path / "run", "lora", *COMPARED) == metrics(finished / "run", "lora", *COMPARED)
    one, two = (load_file(d / "run" / "lora" / "adapter_model.safetensors") for d in (tmp_path, finished))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    config = "adapter_config.json"
    assert (tmp_path / "run" / "lora" / config).read_text().replace(str(tmp_path), "") == (
        finished / "run" / "lora" / config
    ).read_text().replace(str(finished), "")


def test_a_changed_parent_is_refused_when_going_on(finished: Path, tmp_path: Path) -> None:
    recipe = without_lora(finished, tmp_path)
    assert killed(recipe, on_step(5, "lora")) == signal.SIGKILL
    model, _ = load_model(tmp_path / "run" / "moe")
    model.model.language_model.layers[0].self_attn.q_proj.weight.data *= 1.01
    model.save_pretrained(tmp_path / "run" / "moe")
    with pytest.raises(ValueError, match="begun on other weights"):
        train(recipe)


def test_an_adapter_on_fresh_parts_keeps_its_base_and_the_next_stage_starts_from_the_merged_model(
    tiny_parts: dict[str, str], tmp_path: Path
) -> None:
    """Adapter first, with an upcycling of its own; then a stage that trains weights."""
    file = recipe_of(tmp_path, tiny_parts, only=["align"], targets=["language.attention", "moe.experts"])
    recipe = json.loads(file.read_text())
    align = recipe["stages"].pop("align")
    recipe["stages"]["lora"]["upcycle"] = {"layers": [1]}
    recipe["stages"]["after"] = align | {"steps": 1, "optim": {"lr": 1e-12}}
    file.write_text(json.dumps(recipe))
    train(file)
    lora = tmp_path / "run" / "lora"
    assert read_parent(lora)["relative"] == "base"
    model, processor = load_model(lora)
    after, _ = load_model(tmp_path / "run" / "after")
    assert not any(is_adapter_parameter(name) for name in after.state_dict())
    # float32, logits below 1: merging adds the same numbers in another order
    torch.testing.assert_close(logits_of(after, processor), logits_of(model, processor), atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"dora": True, "rslora": True}, {"init": "orthogonal"}, {"dropout": 0.1}])
def test_gradients_reach_every_adapter_parameter_and_no_frozen_one(tiny_model: Any, options: dict[str, Any]) -> None:
    model, processor = tiny_model
    attach(model, Lora(type="lora", r=4, targets=["language", "vision"], **options))
    report = select_trainable(model, ["adapter", "connector"])
    assert {row.part for row in report.parts if row.trainable} == {"adapter", "connector"}
    for name, parameter in model.named_parameters():  # with B = 0 the gradient of A is zero too
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = inputs_of(processor)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        trains = is_adapter_parameter(name) or name.startswith("model.connector.")
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, name


def test_lora_plus_gives_the_second_matrices_their_own_rate(tiny_model: Any) -> None:
    from sparsevlm.recipe.schema import Optim

    model, _ = tiny_model
    attach(model, Lora(type="lora", targets=["language"]))
    select_trainable(model, ["adapter", "connector"])
    optim = Optim(lr=1e-3, part_lr={"adapter": 1e-2})
    groups = {group["name"]: group for group in parameter_groups(model, optim, lora_plus_ratio=16.0)}
    assert {name.removesuffix("/no_decay"): group["lr"] for name, group in groups.items()} == {
        "adapter": 1e-2,
        "adapter.B": 16e-2,
        "connector": 1e-3,
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(".lora_B." in names[id(parameter)] for parameter in groups["adapter.B"]["params"])
    assert len(groups["adapter.B"]["params"]) == len(groups["adapter"]["params"])


def test_the_plan_counts_what_the_stage_trained(finished: Path) -> None:
    recipe = load_recipe(finished / "recipe.json")
    planned = next(stage for stage in plan(recipe)["stages"] if stage["name"] == "lora")
    trained = json.loads((finished / "run" / "lora" / "stage.json").read_text())["summary"]["parameters"]
    assert planned["parameters"] == trained
    held = load_file(finished / "run" / "lora" / "adapter_model.safetensors")
    assert trained["trainable"] == sum(tensor.numel() for tensor in held.values())
    assert planned["lr"].keys() == {"connector", "adapter"}


@pytest.mark.parametrize(
    ("lora", "where", "message"),
    [
        ({"targets": ["language.atention"]}, "adapter.targets.0", "did you mean 'language.attention'"),
        ({"targets": ["q_prj"]}, "adapter.targets.0", "did you mean 'q_proj'"),
        ({"targets": ["moe.experts"]}, "adapter.targets.0", "there is no 'moe.experts'"),
        ({"targets": ["q_proj", "q_proj"]}, "adapter.targets.1", "named twice"),
        ({"targets": ["moe.router"], "dropout": 0.1}, "adapter.targets.0", "cannot do dropout"),
        ({"init": "orthogonal", "r": 3}, "adapter.init", "even r"),
        ({"init": "loftq"}, "adapter.init", "default | gaussian | orthogonal | pissa | olora | eva | corda"),
        ({"type": "lra"}, "adapter.type", "did you mean 'lora'"),
        ({"targets": ["connector"], "stage": {"trains": ["adapter", "connector"]}}, "trains.1", "not both"),
        ({"targets": ["language", "model.connector.*"]}, "trains", "has a target there (model.connector."),
        ({"stage": {"trains": ["connector"]}}, "trains", "that it does not train"),
        ({"stage": {"trains": ["adapter", "language"]}}, "trains.1", "only connector and fusion"),
        ({"stage": {"adapter": None, "trains": ["adapter"]}}, "trains.0", "no 'adapter'"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_line(
    tiny_parts: dict[str, str], tmp_path: Path, lora: dict[str, Any], where: str, message: str
) -> None:
    file = recipe_of(tmp_path, tiny_parts, only=["align"], **lora)
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(file))
    faults = [fault for fault in caught.value.faults if fault.path == f"stages.lora.{where}"]
    assert any(message in fault.message for fault in faults), caught.value


def test_a_float16_recipe_keeps_adapters_in_float32() -> None:
    held = {"model.a.lora_B.default.weight": torch.full((2,), 1e-8), "model.connector.0.weight": torch.ones(2)}
    saved = _float16(held)
    assert [tensor.dtype for tensor in saved.values()] == [torch.float32, torch.float16]
    assert torch.equal(saved["model.a.lora_B.default.weight"], held["model.a.lora_B.default.weight"])


def test_a_rank_as_wide_as_its_matrices_is_noted(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    for rank, noted in ((4, False), (32, True)):
        file = recipe_of(tmp_path, tiny_parts, only=["align"], r=rank, targets=["language.attention"])
        notes = [note for note in plan(load_recipe(file))["notes"] if "no low rank" in note]
        assert bool(notes) == noted
        assert not noted or "8 of 8 modules, whose smaller side is 16" in notes[0]
