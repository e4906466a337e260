"""Adapters on two processes train like on one: plain data parallelism, ZeRO-2, ZeRO-3; for every type there is.

ZeRO-3 runs as `strict_zero` sets it: with tiny models DeepSpeed would otherwise keep everything gathered.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.model.build import load_model
from sparsevlm.recipe.adapter import ADAPTERS, Lora
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train import checkpoints, launch
from sparsevlm.train.launch import train
from tests.adapters.specs import SPECS, Case
from tests.train.runs import metrics, write_recipe
from tests.train.test_sharding import BATCH, COMPARED

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and DeepSpeed on Linux and macOS")

CASES = (
    *SPECS,
    Case("lora+", Lora(type="lora", r=4, lora_plus_ratio=4.0, targets=["language", "connector"])),
    Case("pissa", Lora(type="lora", r=4, init="pissa", targets=["language"])),
    Case("chosen", Lora(type="lora", r=4, targets=["moe.experts"], experts=[0, 2])),
)


def runs() -> list[Any]:
    """Every type under every sharding that its section promises."""
    return [
        pytest.param(case, zero, id=f"{case.name}-zero{zero}", marks=pytest.mark.slow)  # a minute each
        for case in CASES
        for zero in (0, 2, 3)
        if zero <= case.section.zero
    ]


@pytest.fixture(autouse=True)
def _strict_ranks_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call = launch._call

    def strict(command: list[str], *args: Any) -> int:
        return call([{"sparsevlm.train.launch": "tests.train.strict_zero"}.get(word, word) for word in command], *args)

    monkeypatch.setattr(launch, "_call", strict)


@pytest.fixture(scope="module")
def single(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the run directory of a case on one process."""

    @cache
    def run(name: str) -> Path:
        directory = tmp_path_factory.mktemp("single")
        torch.set_num_threads(1)
        train(recipe_of(directory, tiny_parts, next(case for case in CASES if case.name == name)))
        return directory / "run"

    return run


def recipe_of(directory: Path, parts: dict[str, str], case: Case, zero: int = 0, **stage: Any) -> Path:
    """Write a recipe that upcycles a layer and trains an adapter on the result, the connector beside it.

    Every third row is text only, so some step has a rank without a picture.
    """
    section = case.on(upcycled=True).model_dump(mode="json", exclude_unset=True)
    return write_recipe(
        directory,
        parts,
        only=["moe"],
        sharding={"zero": zero},
        stage={
            "trains": ["adapter"] if "connector" in section.get("targets", []) else ["adapter", "connector"],
            "adapter": section,
            "upcycle": {"layers": [1], "aux_loss_coef": 0.1},
            "batch": BATCH,
            **stage,
        },
    )


def assert_alike(one: Path, two: Path, atol: float = 1e-4) -> None:
    """Compare what is logged and saved. `atol` is that of whole models: AdamW's first steps turn the last digit of a
    gradient near zero into a step of the learning rate's size."""
    first, second = metrics(one, "moe", *COMPARED), metrics(two, "moe", *COMPARED)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=atol)
    left, right = (load_file(run / "moe" / "adapter_model.safetensors") for run in (one, two))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape and tensor.dtype == right[name].dtype
        assert torch.allclose(tensor, right[name], atol=atol), name
    configs = [json.loads((run / "moe" / "adapter_config.json").read_text()) for run in (one, two)]
    for config in configs:
        config.pop("base_model_name_or_path")
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("case", "zero"), runs())
def test_two_processes_give_the_loss_curve_and_the_adapter_of_one(
    single: Any, tiny_parts: dict[str, str], tmp_path: Path, case: Case, zero: int
) -> None:
    train(recipe_of(tmp_path, tiny_parts, case, zero), nproc=2)
    assert_alike(single(case.name), tmp_path / "run")
    load_model(tmp_path / "run" / "moe")  # whole, and its parent is the one it was trained on


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_bfloat16_model_keeps_a_float32_adapter(
    single: Any, tiny_parts: dict[str, str], tmp_path: Path, zero: int
) -> None:
    """DeepSpeed trains it in bfloat16 through float32 masters, and the masters are saved."""
    lora = next(case for case in CASES if case.name == "lora")
    train(recipe_of(tmp_path, tiny_parts, lora, zero, precision="bf16"), ["model.dtype=bfloat16"], nproc=2)
    losses = [[loss for (loss,) in metrics(run, "moe", "loss")] for run in (single("lora"), tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    saved = load_file(tmp_path / "run" / "moe" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        assert tensor.dtype == (torch.float32 if is_adapter_parameter(name) else torch.bfloat16), name
    adapter = [tensor for name, tensor in saved.items() if is_adapter_parameter(name)]
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapter)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_killed_run_continues_exactly(tiny_parts: dict[str, str], tmp_path: Path, zero: int) -> None:
    lora = next(case for case in CASES if case.name == "lora")
    common = {"steps": 20, "save_every": 5}
    train(recipe_of(tmp_path / "whole", tiny_parts, lora, zero, **common), nproc=2)
    cut = recipe_of(tmp_path / "cut", tiny_parts, lora, zero, **common)
    code = f"from sparsevlm.train.launch import train; train({str(cut)!r}, nproc=2)"
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), stderr=subprocess.DEVNULL)
    root = tmp_path / "cut" / "run" / "moe" / "checkpoints"
    until = time.monotonic() + 240
    while checkpoints.latest(root) is None and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints.latest(root) is not None
    train(cut, nproc=2)
    runs = [tmp_path / name / "run" for name in ("cut", "whole")]
    assert metrics(runs[0], "moe", *COMPARED) == metrics(runs[1], "moe", *COMPARED)
    left, right = (load_file(run / "moe" / "adapter_model.safetensors") for run in runs)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def refusals(directory: Path, parts: dict[str, str], case: Case, zero: int) -> list[Any]:
    """What a recipe is refused for."""
    try:
        load_recipe(recipe_of(directory, parts, case, zero))
    except RecipeError as error:
        return list(error.faults)
    return []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_type_cannot_do_is_refused_at_its_line(
    tiny_parts: dict[str, str], tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for zero in (1, 2, 3):
        assert bool(refusals(tmp_path, tiny_parts, case, zero)) == (zero > case.section.zero)
    monkeypatch.setattr(ADAPTERS[case.type], "zero", 1)
    (fault,) = refusals(tmp_path, tiny_parts, case, 2)
    assert fault.path == "stages.moe.adapter.type"
    assert "set 'sharding: {zero: 1}'" in fault.message


def test_only_what_an_adapter_directory_holds_is_gathered(tiny_model: Any) -> None:
    from sparsevlm.adapters.attach import adapter_state, attach
    from sparsevlm.train.parts import select_trainable
    from sparsevlm.train.stage import adapter_tensors

    model, _ = tiny_model
    attach(model, Lora(type="lora", r=4, targets=["language"]))
    select_trainable(model, ["adapter", "connector"])
    state = adapter_tensors(model)
    want, blocks = adapter_state(model)
    got, _ = adapter_state(model, state)
    assert got.keys() == want.keys() and blocks
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    assert len(state) == len(want)  # and nothing of the frozen weights


def test_the_plan_shards_frozen_weights_and_counts_states_of_what_trains(
    tiny_parts: dict[str, str], tmp_path: Path
) -> None:
    from sparsevlm.train.plan import plan

    lora = next(case for case in CASES if case.name == "lora")
    planned = {
        zero: plan(load_recipe(recipe_of(tmp_path, tiny_parts, lora, zero)), world=2)["stages"][0] for zero in (0, 2, 3)
    }
    total, trained = (planned[3]["parameters"][key] for key in ("total", "trainable"))
    assert 0 < trained < total / 2
    memory = {zero: stage["memory"] for zero, stage in planned.items()}
    assert [memory[zero]["weights"] for zero in (0, 2, 3)] == [4 * total, 4 * total, 4 * (total // 2)]
    assert [memory[zero]["gradients"] for zero in (0, 2, 3)] == [4 * trained, 4 * (trained // 2), 4 * (trained // 2)]
    assert [memory[zero]["optimizer"] for zero in (0, 2, 3)] == [8 * trained, 6 * trained, 6 * trained]
