"""Two processes train like one: plain data parallelism and ZeRO, MoE stage and text-only ranks included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsevlm.recipe.load import load_recipe
from sparsevlm.train import checkpoints
from sparsevlm.train.data import stage_data
from sparsevlm.train.launch import train
from sparsevlm.train.stage import SKIPPED
from tests.train.runs import metrics, write_recipe

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and DeepSpeed on Linux and macOS")

COMPARED = ("loss", "grad_norm", "aux_loss")
BATCH = {
    "rows": 4,
    "rows_per_rank": 1,
    "workers": 0,
    "max_length": 64,
    "packing": False,
    "group_by_length": False,
}
STAGE = {
    "trains": ["connector", "language"],
    "upcycle": {"layers": [1], "aux_loss_coef": 0.1},
    "batch": BATCH,
}


@pytest.fixture(autouse=True)
def _one_thread_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def module_parts(tiny_parts: dict[str, str]) -> dict[str, str]:
    return tiny_parts


@pytest.fixture(scope="module")
def single(module_parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of one process."""
    directory = tmp_path_factory.mktemp("single")
    torch.set_num_threads(1)
    train(write_recipe(directory, module_parts, **with_questions(directory, only=["moe"], stage=STAGE)))
    return directory / "run"


def with_questions(directory: Path, **changes: Any) -> dict[str, Any]:
    """Recipe changes that evaluate the stage on some questions."""
    questions = [{"id": str(i), "question": "what is a cat ?", "answer": "a", "kind": "animal"} for i in range(4)]
    file = directory / "questions.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(questions))
    return {**changes, "evals": {"asked": {"task": "vqa", "path": str(file), "max_new_tokens": 3}}}


def answers(run: Path) -> list[str]:
    """What the model said."""
    return [json.loads(line)["prediction"] for line in (run / "moe/eval/asked.jsonl").read_text().splitlines()]


def assert_alike(one: Path, two: Path, stage: str = "moe", atol: float = 1e-4) -> None:
    first, second = metrics(one, stage, *COMPARED), metrics(two, stage, *COMPARED)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=atol)
    counts = ("step", "tokens", "target_tokens", "visual_tokens", "samples", "padding_share")
    assert metrics(one, stage, *counts) == metrics(two, stage, *counts)
    left, right = (load_file(run / stage / "model.safetensors") for run in (one, two))
    assert left.keys() == right.keys()  # a complete model, whatever the sharding
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], atol=atol), name


def test_some_step_has_a_rank_with_text_only(single: Path, module_parts: Any, tmp_path: Path) -> None:
    """What the runs below rest on."""
    from sparsevlm.model.build import load_model

    recipe = load_recipe(write_recipe(tmp_path, module_parts, only=["moe"], stage=STAGE))
    data = stage_data(recipe, "moe", *load_model(single / "moe"), tmp_path / SKIPPED)
    images = [any(encoded.pixel_values is not None for encoded in data[i]) for i in range(len(data))]
    pairs = list(zip(images[::2], images[1::2], strict=True))
    assert (True, False) in pairs or (False, True) in pairs
    assert (True, True) in pairs


@pytest.mark.parametrize(
    "zero", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3]
)
def test_two_processes_give_the_loss_curve_of_one(single: Path, module_parts: Any, tmp_path: Path, zero: int) -> None:
    changes = with_questions(tmp_path, only=["moe"], stage=STAGE, sharding={"zero": zero})
    train(write_recipe(tmp_path, module_parts, **changes), nproc=2)
    assert_alike(single, tmp_path / "run")
    assert answers(tmp_path / "run") == answers(single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding", [{"zero": 2, "offload": "optimizer"}, {"zero": 3, "offload": "all"}], ids=["zero2", "zero3"]
)
def test_offloaded_states_give_the_same_curve(single: Path, module_parts: Any, tmp_path: Path, sharding: Any) -> None:
    train(write_recipe(tmp_path, module_parts, only=["moe"], stage=STAGE, sharding=sharding), nproc=2)
    assert_alike(single, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_stages_follow_each_other_under_sharding(module_parts: Any, tmp_path: Path, zero: int) -> None:
    """Packed, with recomputation, tower trained, tied embeddings: align on one sharding, moe on its output."""
    stage = {"gradient_checkpointing": True, "trains": ["vision", "connector", "language"]}
    for name, nproc in (("one", 1), ("two", 2)):
        train(
            write_recipe(tmp_path / name, module_parts, stage=stage, sharding={"zero": zero}),
            nproc=nproc,
        )
    for stage_name in ("align", "moe"):
        assert_alike(tmp_path / "one" / "run", tmp_path / "two" / "run", stage_name)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_stays_near_one_process(module_parts: Any, tmp_path: Path, zero: int, dtype: str) -> None:
    stage = {**STAGE, "precision": "bf16", "optim": {"lr": 5e-4}}
    for name, nproc in (("one", 1), ("two", 2)):
        recipe = write_recipe(tmp_path / name, module_parts, only=["moe"], stage=stage, sharding={"zero": zero})
        train(recipe, [f"model.dtype={dtype}"], nproc=nproc)
    one, two = (metrics(tmp_path / name / "run", "moe", "loss") for name in ("one", "two"))
    assert [loss for (loss,) in one] == pytest.approx([loss for (loss,) in two], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_killed_sharded_run_continues_exactly(module_parts: Any, tmp_path: Path, zero: int) -> None:
    """The launcher alone is killed; its ranks go down with it, and the next start takes over."""
    common = {"only": ["moe"], "sharding": {"zero": zero}, "stage": {**STAGE, "steps": 30, "save_every": 5}}
    whole = write_recipe(tmp_path / "whole", module_parts, **common)
    train(whole, nproc=2)
    cut = write_recipe(tmp_path / "cut", module_parts, **common)
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
    assert metrics(tmp_path / "cut" / "run", "moe", *COMPARED) == metrics(tmp_path / "whole" / "run", "moe", *COMPARED)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_nan_stops_all_ranks_before_the_update(module_parts: Any, tmp_path: Path, zero: int) -> None:
    from sparsevlm.train.launch import LaunchError

    recipe = write_recipe(
        tmp_path, module_parts, only=["moe"], sharding={"zero": zero}, stage={**STAGE, "optim": {"lr": 1e30}}
    )
    with pytest.raises(LaunchError, match="'moe' failed"):
        train(recipe, nproc=2)
    bad = (tmp_path / "run" / "moe" / "bad_batch.json").read_text()
    assert '"samples"' in bad
