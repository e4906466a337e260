"""Whole runs from a recipe file: what is written, what is skipped, refused, and continued after kill -9."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import load_recipe
from sparsevlm.rundir import COMPLETE, resolve_model
from sparsevlm.train import checkpoints, launch, prepare
from sparsevlm.train.launch import train
from sparsevlm.train.stage import _float16
from sparsevlm.train.summary import StageSummary, print_run
from tests.train.runs import metrics, write_data, write_recipe

COMPARED = ("step", "loss", "grad_norm", "aux_loss", "tokens", "samples", "lr")


@pytest.fixture(scope="module")
def module_parts(tiny_parts: dict[str, str]) -> dict[str, str]:
    return tiny_parts


@pytest.fixture(scope="module")
def finished(module_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an uninterrupted run (`recipe.json`, `run/`)."""
    directory = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    train(write_recipe(directory, module_parts))
    return directory


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model.safetensors")


def assert_equal_runs(one: Path, two: Path, stages: Sequence[str]) -> None:
    """Same losses in every log and same weights, bit for bit."""
    for stage in stages:
        assert metrics(one, stage, *COMPARED) == metrics(two, stage, *COMPARED)
        first, second = weights(one, stage), weights(two, stage)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_run_leaves_complete_model_directories_and_a_summary(finished: Path) -> None:
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert [row["name"] for row in summary["stages"]] == ["align", "moe"]
    for row in summary["stages"]:
        expected = {"name", "seconds", "loss_first", "loss_last", "tokens_per_second", "parameters", "eval"}
        assert expected <= set(row)
        losses = [loss for (loss,) in metrics(run, row["name"], "loss")]
        assert (row["loss_first"], row["loss_last"]) == (losses[0], losses[-1])
        assert set(row["parameters"]) == {"total", "trainable", "activated", "language_model"}
    dense, sparse = (row["parameters"] for row in summary["stages"])
    assert dense["activated"] == dense["total"] < sparse["activated"] < sparse["total"]
    for stage in ("align", "moe"):
        directory = run / stage
        model, processor = load_model(directory)
        assert sum(p.numel() for p in model.parameters()) == summary["stages"][stage == "moe"]["parameters"]["total"]
        assert model.config.text_config.use_cache
        assert "use_cache" not in json.loads((directory / "config.json").read_text())
        assert processor.chat_template
        record = json.loads((directory / "stage.json").read_text())
        assert (record["parent"] or {}).get("stage") == (None if stage == "align" else "align")
        assert record["versions"]["torch"]
        assert load_recipe(directory / "recipe.yaml").stages[stage].steps == 6
        assert not (directory / "checkpoints").exists()
    assert resolve_model(run) == str(run / "moe")
    assert not list(run.rglob("*.bin"))  # nothing pickled is left


def test_align_changes_the_connector_only_and_moe_starts_from_it(finished: Path) -> None:
    from sparsevlm.model.build import build_model

    recipe = load_recipe(finished / "recipe.json")
    torch.manual_seed(recipe.seed)
    fresh, _ = build_model(recipe.model)
    align, moe = weights(finished / "run", "align"), weights(finished / "run", "moe")
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(align[name], tensor) == ("connector" not in name), name
    ffn = {"model.language_model.layers.1.mlp." + n for n in ("gate_proj.weight", "up_proj.weight", "down_proj.weight")}
    assert align.keys() - moe.keys() == ffn
    for name in align.keys() & moe.keys():
        assert torch.equal(align[name], moe[name]) == ("connector" not in name), name


def test_the_tables_fit_a_terminal_and_show_every_stage(finished: Path) -> None:
    from rich.console import Console

    rows = [StageSummary.from_dict(r) for r in json.loads((finished / "run/summary.json").read_text())["stages"]]
    cells = {"colour": {"accuracy": 0.9, "chance": 0.25, "n": 40, "core": True}}
    cells["binding"] = {"accuracy": 0.5, "chance": 0.4, "n": 10, "core": False}
    rows[1] = StageSummary.from_dict({**rows[1].to_dict(), "eval": cells})
    text = io.StringIO()
    print_run(rows, Console(file=text, width=80))
    shown = text.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    for expected in ("align", "moe", "90.0 %", "25.0 %", "binding (not core)"):
        assert expected in shown
    assert "…" not in shown


def test_a_long_name_of_a_stage_cuts_no_column_off() -> None:
    from rich.console import Console

    counts = {"total": 1_520_000, "trainable": 430_000, "activated": 1_340_000}
    row = StageSummary("lora_experts", 98_765.0, 0.75, 0.58, 858.0, counts, trains=("adapter", "connector"))
    text = io.StringIO()
    print_run([row], Console(file=text, width=80))
    assert "98765" in text.getvalue()


# ---- started again ---------------------------------------------------------------------------------------------------


def test_float16_is_what_is_saved_and_said(module_parts: Any, tmp_path: Path) -> None:
    """Training keeps float32, and the routers' balance bias stays in it."""
    router = {"scoring": "sigmoid", "bias_update_rate": 1e-3}
    stage = {"steps": 1, "upcycle": {"router": router}, "trains": ["moe"]}
    train(write_recipe(tmp_path, module_parts, only=["moe"], stage=stage), ["model.dtype=float16"])
    saved = weights(tmp_path / "run", "moe")
    biases = {name for name in saved if name.endswith("e_score_correction_bias")}
    assert biases == {name for name, tensor in saved.items() if tensor.dtype != torch.float16}
    assert all(saved[name].dtype == torch.float32 and saved[name].any() for name in biases)
    assert load_model(tmp_path / "run" / "moe")[0].dtype == torch.float16
    counts = _float16({"num_batches_tracked": torch.tensor(70_000), "weight": torch.ones(1)})
    assert [tensor.dtype for tensor in counts.values()] == [torch.int64, torch.float16]


def test_finished_stages_are_kept(finished: Path) -> None:
    files = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.safetensors")}
    assert [row.name for row in train(finished / "recipe.json")] == ["align", "moe"]
    assert files == {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.safetensors")}


def test_evaluations_follow_a_stage_and_are_repeated_when_they_change(module_parts: Any, tmp_path: Path) -> None:
    questions = [{"id": str(i), "question": "what is a cat ?", "answer": "red", "kind": "animal"} for i in range(3)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    evals = {"asked": {"task": "vqa", "path": str(tmp_path / "questions.json"), "max_new_tokens": 2}}
    recipe = write_recipe(tmp_path, module_parts, only=["align"], stage={"steps": 1}, evals=evals)
    (row,) = train(recipe)
    assert row.eval["animal"]["n"] == 3
    assert set(row.eval["animal"]) == {"accuracy", "chance", "n", "core"}
    assert len((tmp_path / "run/align/eval/asked.jsonl").read_text().splitlines()) == 3
    weights_at = (tmp_path / "run/align/model.safetensors").stat().st_mtime_ns
    (row,) = train(recipe, ["evals.asked.limit=2"])
    assert row.eval["animal"]["n"] == 2
    (row,) = train(recipe, ["evals.asked.limit=2", "stages.align.evals=[]"])
    assert row.eval == {}
    record = json.loads((tmp_path / "run/align/stage.json").read_text())
    del record["eval_specs"]  # as older versions left it
    (tmp_path / "run/align/stage.json").write_text(json.dumps(record))
    (row,) = train(recipe)
    assert row.eval["animal"]["n"] == 3
    assert weights_at == (tmp_path / "run/align/model.safetensors").stat().st_mtime_ns


def test_a_finished_stage_of_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\.align\.optim\.lr: 0\.005 -> 0\.001"):
        train(finished / "recipe.json", ["stages.align.optim.lr=1e-3"])


def test_a_child_of_another_parent_is_refused(module_parts: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, module_parts, stage={"steps": 1})
    train(recipe)
    checkpoints.remove(tmp_path / "run" / "align")
    with pytest.raises(ValueError, match=r"'moe' in .* was trained from an earlier align"):
        train(recipe)


def test_changed_data_are_refused_when_going_on(module_parts: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, module_parts, only=["align"])
    assert killed(recipe, on_step(3)) == signal.SIGKILL
    write_data(tmp_path / "data", rows=44)
    with pytest.raises(ValueError, match="the data changed since"):
        train(recipe)


def test_batches_that_do_not_divide_are_named_for_all_stages_at_once(module_parts: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        train(write_recipe(tmp_path, module_parts), nproc=3)
    for stage in ("align", "moe"):
        assert "recipe.json:1:" in str(error.value)
        assert f"stages.{stage}.batch.rows: batch.rows 4 cannot be divided over 3" in str(error.value)


def test_what_would_stop_a_later_stage_is_refused_before_the_first(module_parts: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, module_parts)
    with pytest.raises(ValueError, match=r"stages\.moe\.upcycle"):
        train(recipe, ["stages.moe.upcycle.layers=[7]"])
    with pytest.raises(ValueError, match=r"data\.late\.path: no file 'late\.json'"):
        train(recipe, ["data.late={path: late.json, format: llava}", "stages.moe.data=[late]"])
    assert not (tmp_path / "run" / "align").exists()


def test_two_runs_in_one_directory_are_refused(
    module_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(launch, "WAIT_FOR_LOCK", 0.1)
    recipe = write_recipe(tmp_path, module_parts)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / launch.LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is using"):
            train(recipe)


def test_upcycling_that_changes_the_function_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    recipe = load_recipe(finished / "recipe.json")
    monkeypatch.setattr(prepare, "UPCYCLE_TOLERANCE", -1.0)  # no difference is small enough
    with pytest.raises(ValueError, match="upcycling changed the logits"):
        prepare.start_model(recipe, "moe", finished / "run" / "align", Console(file=io.StringIO()))


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def killed(recipe: Path, arm: Callable[[], None]) -> int:
    """Run a recipe in a forked process that `arm` prepares to die; return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            arm()
            train(recipe)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_step(step: int, stage: str = "align") -> Callable[[], None]:
    """Die in the forward pass of a step, between checkpoints."""

    def arm() -> None:
        from sparsevlm.train.trainer import VLMTrainer

        inner = VLMTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step and self.stage_dir.name == stage:
                die()
            return inner(self, *args, **kwargs)

        VLMTrainer.compute_loss = compute_loss  # type: ignore[method-assign]

    return arm


def while_writing(step: int, name: str) -> Callable[[], None]:
    """Die inside the write of a checkpoint, when a method of the trainer or of `checkpoints` is called."""

    def arm() -> None:
        from sparsevlm.train.trainer import VLMTrainer

        owner: Any = VLMTrainer if hasattr(VLMTrainer, name) else checkpoints
        inner = getattr(owner, name)
        written = []

        def patched(*args: Any, **kwargs: Any) -> Any:
            written.append(name)
            if len(written) == step:
                die()
            return inner(*args, **kwargs)

        setattr(owner, name, patched)

    return arm


def before_saving_the_stage() -> None:
    from sparsevlm.train import stage

    stage.save_output = die


def before_the_stage_is_complete() -> None:
    from sparsevlm.train import stage

    stage.finish_stage = die


@pytest.mark.parametrize(
    ("arm", "stages"),
    [
        pytest.param(on_step(1), ["align"], id="before the first checkpoint"),
        pytest.param(on_step(5), ["align"], id="between checkpoints"),
        pytest.param(while_writing(2, "_save_optimizer_and_scheduler"), ["align"], id="during a write, after weights"),
        pytest.param(while_writing(2, "_save_rng_state"), ["align"], id="during a write, after the optimizer"),
        pytest.param(while_writing(2, "mark_complete"), ["align"], id="during a write, before the marker"),
        pytest.param(while_writing(2, "rotate"), ["align"], id="after a write"),
        pytest.param(while_writing(1, "remove"), ["align"], id="while an old checkpoint is removed"),
        pytest.param(on_step(3, "moe"), ["align", "moe"], id="in the second stage"),
        pytest.param(before_saving_the_stage, ["align"], id="before the stage is saved"),
        pytest.param(before_the_stage_is_complete, ["align"], id="before the stage is complete"),
    ],
)
def test_a_killed_run_continues_exactly(
    module_parts: Any, finished: Path, tmp_path: Path, arm: Callable[[], None], stages: list[str]
) -> None:
    recipe = write_recipe(tmp_path, module_parts, only=stages)
    assert killed(recipe, arm) == signal.SIGKILL
    run = tmp_path / "run"
    assert not all((run / stage / COMPLETE).is_file() for stage in stages)
    train(recipe)
    assert_equal_runs(run, finished / "run", stages)


def test_an_interrupted_write_is_cleaned_at_the_next_start(module_parts: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, module_parts, only=["align"])
    assert killed(recipe, while_writing(2, "mark_complete")) == signal.SIGKILL
    root = tmp_path / "run" / "align" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert checkpoints.latest(root) == root / "checkpoint-2"
    assert killed(recipe, on_step(2)) == signal.SIGKILL  # started again, killed at once
    assert [p.name for p in root.iterdir()] == ["checkpoint-2"]
