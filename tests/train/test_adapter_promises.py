"""What users of other tools report of adapters, and what none of it may be here.

Adapters on experts left untrained or dropped without a word, intermediate checkpoints without the projector, files that
lack weights and load all the same.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.model.build import load_model
from sparsevlm.train.launch import train
from tests.train.test_adapter_stage import recipe_of
from tests.train.test_launch import killed, on_step

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def stage(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a stage that upcycles and adapts experts 0 and 2; its last checkpoint is copied beside the run."""
    directory = tmp_path_factory.mktemp("promises")
    torch.set_num_threads(1)
    options = {"targets": ["language.attention", "moe.experts"], "experts": [0, 2]}
    file = recipe_of(directory, tiny_parts, only=["align"], stage={"upcycle": {"layers": [1]}}, **options)
    recipe = json.loads(file.read_text())
    recipe["stages"].pop("align")
    file.write_text(json.dumps(recipe))
    assert killed(file, on_step(5, "lora")) == signal.SIGKILL
    checkpoint = max((directory / "run" / "lora" / "checkpoints").glob("checkpoint-*/COMPLETE")).parent
    (directory / "trainables.safetensors").write_bytes((checkpoint / "trainables.safetensors").read_bytes())
    train(file)
    return directory / "run" / "lora"


def test_intermediate_checkpoints_hold_the_projector_and_the_adapters_of_experts(stage: Path) -> None:
    held = load_file(stage.parent.parent / "trainables.safetensors")
    base = load_file(stage / "base" / "model.safetensors")
    projector = {name for name in base if name.startswith("model.connector.")}
    assert projector
    assert projector <= held.keys()
    assert not any(torch.equal(held[name], base[name]) for name in projector)
    experts = [name for name in held if ".experts." in name]
    assert len(experts) == 4  # A and B of both stacks
    assert all(bool(held[name].any()) for name in experts)


def test_adapters_of_experts_were_trained_and_are_in_the_file(stage: Path) -> None:
    saved = load_file(stage / WEIGHTS)
    earlier = load_file(stage.parent.parent / "trainables.safetensors")
    experts = {name: tensor for name, tensor in saved.items() if ".experts." in name}
    assert len(experts) == 4
    for name, tensor in experts.items():
        # 4 experts of rank 4; A has an expert's rows together, B its columns spread
        each = tensor.reshape(4, 4, -1) if "lora_A" in name else tensor.reshape(len(tensor), 4, 4).permute(2, 0, 1)
        assert [bool(one.any()) for one in each] == [True, False, True, False], name
        before = earlier[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
        compact = (
            tensor.reshape(4, 4, -1)[[0, 2]] if "lora_A" in name else tensor.reshape(len(tensor), 4, 4)[..., [0, 2]]
        )
        assert not torch.equal(compact.reshape(before.shape), before)  # two more steps
    model, _ = load_model(stage)
    assert sum(".experts." in name and is_adapter_parameter(name) for name, _ in model.named_parameters()) == 4


@pytest.mark.parametrize("change", ["expert", "attention", "projector", "extra"])
def test_a_file_with_missing_or_extra_weights_is_refused_by_name(stage: Path, tmp_path: Path, change: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in stage.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    held = load_file(stage / WEIGHTS)
    mark = {"expert": ".experts.lora_B", "attention": "q_proj.lora_A", "projector": "connector.0", "extra": "o_proj"}
    name = next(name for name in held if mark[change] in name)
    if change == "extra":
        name = name.replace("layers.0", "layers.7")
        held[name] = torch.zeros(4, 32)
    else:
        del held[name]
    save_file(held, broken / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as error:
        load_model(broken, base=stage / "base")
    named = name.removeprefix("base_model.model.").removesuffix(".weight")
    assert named.rpartition("connector.0.")[2] in str(error.value)
