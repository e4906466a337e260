"""A fusion on two processes trains like on one: ZeRO-2 and ZeRO-3, a rank with text or with clips alone in some steps.

ZeRO-3 runs as `strict_zero` sets it: with tiny models DeepSpeed would otherwise keep everything gathered.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsevlm.model.build import load_model
from sparsevlm.train import launch
from sparsevlm.train.launch import train
from tests import tiny
from tests.data.media_files import write_video
from tests.train.runs import metrics, write_data, write_recipe
from tests.train.test_sharding import BATCH, COMPARED

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,  # a minute each
    pytest.mark.skipif(sys.platform == "win32", reason="gloo and DeepSpeed on Linux and macOS"),
]

CROSS = {"type": "gated_cross_attention", "every": 1, "heads": 2, "head_dim": 8}
RESAMPLER = {"type": "perceiver_resampler", "latents": 4, "depth": 1, "heads": 2, "time_frames": 2}
FUSIONS: dict[str, dict[str, Any]] = {
    "cross": {"fusion": CROSS, "connector": [RESAMPLER]},
    "expert": {"fusion": {"type": "visual_expert", "layers": [0]}},
    "sparse": {"fusion": {"type": "visual_expert", "ffn": False}},
}
ROUTED = {"layers": [1], "aux_loss_coef": 0.1}
BY_MODALITY = {"layers": "all", "experts": 2, "top_k": 1, "aux_loss_coef": 0, "router": {"scoring": "modality"}}


@pytest.fixture(autouse=True)
def _strict_ranks_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call = launch._call

    def strict(command: list[str], *args: Any) -> int:
        return call([{"sparsevlm.train.launch": "tests.train.strict_zero"}.get(word, word) for word in command], *args)

    monkeypatch.setattr(launch, "_call", strict)


@pytest.fixture(scope="module")
def single(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the run directory of a fusion on one process."""

    @cache
    def run(name: str) -> Path:
        directory = tmp_path_factory.mktemp("single")
        torch.set_num_threads(1)
        train(recipe_of(directory, tiny_parts, name))
        return directory / "run"

    return run


def recipe_of(directory: Path, parts: dict[str, str], name: str, zero: int = 0) -> Path:
    """Write a recipe that upcycles a layer beside the fusion and trains both, on text, pictures and clips alike."""
    file = write_data(directory / "data", rows=24)
    write_video(file.parent / "clip.mp4", frames=4, fps=2)
    records = json.loads(file.read_text())
    for record in records[1::3]:
        del record["image"]
        record["video"] = "clip.mp4"
        record["conversations"][0]["value"] = "<video>\nwhat color is this ?"
    file.write_text(json.dumps(records))
    stage = {
        "trains": ["connector", "fusion", "moe"],
        "upcycle": BY_MODALITY if name == "sparse" else ROUTED,
        "batch": {**BATCH, "rows_per_rank": 2},
        "gradient_checkpointing": True,
    }
    return write_recipe(
        directory,
        parts,
        only=["moe"],
        sharding={"zero": zero},
        stage=stage,
        model=tiny.recipe_model(parts, video={"fps": None, "max_frames": 3}, **FUSIONS[name]).model_dump(
            mode="json", exclude_unset=True
        ),
    )


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("name", FUSIONS)
def test_two_processes_give_the_loss_curve_and_the_model_of_one(
    single: Any, tiny_parts: dict[str, str], tmp_path: Path, name: str, zero: int
) -> None:
    train(recipe_of(tmp_path, tiny_parts, name, zero), nproc=2)
    one, two = single(name), tmp_path / "run"
    first, second = metrics(one, "moe", *COMPARED), metrics(two, "moe", *COMPARED)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    left, right = (load_file(run / "moe" / "model.safetensors") for run in (one, two))
    assert left.keys() == right.keys()
    gates = [name for name in left if name.endswith("_gate")]
    assert bool(gates) == ("gated" in FUSIONS[name]["fusion"]["type"]) and all(left[name].any() for name in gates)
    for key, tensor in left.items():
        assert torch.allclose(tensor, right[key], atol=1e-4), key
    load_model(two / "moe")
