"""`run_stage`: load the parent directory, edit, choose what trains, train, save, evaluate."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.recipe.load import dump_recipe
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train import checkpoints
from sparsevlm.train.adapter_start import read_adapter_start
from sparsevlm.train.evaluation import by_kind, eval_specs, evaluate_stage, survey_stage, trained_model
from sparsevlm.train.expert_parallel import complete_state, ranks_of_experts
from sparsevlm.train.fingerprint import check_unchanged, stage_inputs
from sparsevlm.train.parts import parts_of
from sparsevlm.train.prepare import CHECKPOINTS, START, save_start, start_model, training_dtype
from sparsevlm.train.sharding import cast_adapter, gather_state, uses_deepspeed
from sparsevlm.train.summary import STAGE_FILE, StageSummary, losses_and_speed, print_trainable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from torch import Tensor, nn

    from sparsevlm.train.trainer import VLMTrainer

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
_OUTPUT = ".output"
_PACKAGES = (
    "sparsevlm",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "numpy",
)


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Tell whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def run_stage(
    recipe: Recipe,
    name: str,
    parent_dir: Path | None,
    run_dir: Path,
    *,
    start: Path | None = None,
    console: Console | None = None,
) -> StageSummary | None:
    """Run one stage to its end, from its last complete checkpoint if there is one.

    Args:
        recipe: The resolved recipe.
        name: The stage.
        parent_dir: Complete directory of the stage before; None for the first stage.
        run_dir: Directory of the run.
        start: Directory that all ranks load instead (`prepare.save_start`); needed with several processes.
        console: Where to print; default standard error.

    Returns:
        The stage's row on rank 0, None on the others.

    Raises:
        ValueError: Something in the recipe, the parts or the data is wrong, or a number became non-finite.
    """
    from rich.console import Console

    console = console or Console(file=sys.stderr)
    _quiet(console)
    from sparsevlm.adapters.attach import attach
    from sparsevlm.adapters.saved import weights_hash
    from sparsevlm.model.build import load_model
    from sparsevlm.train.arguments import set_num_steps, training_arguments
    from sparsevlm.train.balance import balance_callbacks
    from sparsevlm.train.callbacks import MetricsWriter, ProgressLine, read_metrics
    from sparsevlm.train.data import make_collator, stage_data
    from sparsevlm.train.feature_cache import CachingTrainer, open_store
    from sparsevlm.train.loader import fit_rows
    from sparsevlm.train.parts import count_parameters, select_trainable
    from sparsevlm.train.trainer import VLMTrainer

    started = time.perf_counter()
    stage, stage_dir, main = recipe.stages[name], run_dir / name, is_main_process()
    stage_dir.mkdir(parents=True, exist_ok=True)
    sharded = uses_deepspeed(recipe, stage, world_size())
    if stage.adapter is not None and start is None:
        start = save_start(recipe, name, parent_dir, stage_dir, console)
    resume = _resume_point(recipe, name, stage_dir, console)
    earlier = read_metrics(stage_dir / METRICS) if resume is not None else []

    fitted = fit_rows(recipe, world_size())
    args = training_arguments(fitted, name, stage_dir=stage_dir, world_size=world_size(), sharded=sharded, start=start)
    if start is None:
        model, processor = start_model(recipe, name, parent_dir, console)
    else:
        model, processor = load_model(start, training_dtype(recipe), recipe.model.language.attention)
    if stage.adapter is not None:
        begun = read_adapter_start(recipe, name, stage_dir / CHECKPOINTS)
        adapted = attach(model, stage.adapter, seed=recipe.seed, start=begun)
        cast_adapter(model, args.deepspeed)
        if main:
            console.print(f"{name}: {adapted.describe()}", highlight=False, markup=False, soft_wrap=True)
    report = select_trainable(model, stage.trains, stage.optim)
    parameters = count_parameters(model)
    if main:
        print_trainable(report, name, console)
    store = open_store(recipe, name, model, console if main else None)
    data = stage_data(fitted, name, model, processor, stage_dir / SKIPPED, store)
    parent = None if stage.adapter is None or start is None else weights_hash(start)
    marker = _marker(recipe, name, sharded, data.fingerprint) | ({"parent": parent} if parent else {})
    if resume is not None:
        _check_resume(resume, marker, stage_dir)
    set_num_steps(args, stage, data.num_steps)
    progress = ProgressLine(name, console, **_shown_routers(model))
    trainer = (VLMTrainer if store is None else partial(CachingTrainer, store=store))(
        model,
        args,
        processor=processor,
        dataset=data,
        collator=make_collator(processor, packed=data.packed),
        optim=stage.optim,
        lora_plus_ratio=getattr(stage.adapter, "lora_plus_ratio", 1.0),
        stage_dir=stage_dir,
        marker=marker,
        callbacks=[MetricsWriter(stage_dir / METRICS), progress, *balance_callbacks(model)],
    )
    if recipe.hub is not None:
        from sparsevlm.train.hub_writer import snapshots_of

        writes = partial(write_output, trainer, recipe, start=start)
        trainer.add_callback(snapshots_of(trainer, recipe, name, stage_dir, writes, versions(), console))
    try:
        trainer.train(str(resume) if resume is not None else None)
    finally:
        progress.close()
    save_output(trainer, recipe, stage_dir, start)
    if not main:
        return None
    if isinstance(trainer, CachingTrainer):
        console.print(f"{name}: {trainer.describe()}", highlight=False)
    if data.skips.skipped:
        console.print(f"{name}: {data.skips.summary()}; see {stage_dir / SKIPPED}", highlight=False)
    trained = trained_model(trainer, recipe, stage_dir)
    evals = evaluate_stage(recipe, name, *trained, stage_dir)
    survey_stage(recipe, name, *trained, stage_dir)
    rows = read_metrics(stage_dir / METRICS)
    first, last, speed, _ = losses_and_speed(rows)
    summary = StageSummary(
        name=name,
        seconds=round(time.perf_counter() - started + losses_and_speed(earlier)[3], 2),
        loss_first=first,
        loss_last=last,
        tokens_per_second=round(speed, 1),
        parameters=parameters,
        eval=by_kind(evals),
        trains=tuple(stage.trains),
    )
    finish_stage(recipe, name, parent_dir, stage_dir, summary, {key: result.report for key, result in evals.items()})
    return summary


def _shown_routers(model: Any) -> dict[str, Any]:
    """Return whose balance the progress line shows: that of the adapter's routers, where it has some."""
    from sparsevlm.moe.groups import router_groups
    from sparsevlm.moe.modality import goes_by_modality

    groups = router_groups(model)
    if not groups:
        return {}
    group, settings = list(groups.items())[-1]
    if goes_by_modality(settings):  # there is nothing to balance
        return {"group": ""}
    return {"group": group, "collapsed": settings["num_experts_per_tok"] / settings["num_experts"]}


def _quiet(console: Console) -> None:
    """Keep out of the way of our own output: bars of libraries, and what they say about absent hardware."""
    import warnings

    import torch
    from transformers.utils import logging

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # one a step, from DeepSpeed
    if not console.is_terminal or not is_main_process():
        logging.disable_progress_bar()


def _marker(recipe: Recipe, name: str, sharded: bool, data: str) -> dict[str, Any]:
    """What the markers of this stage's checkpoints say, to be checked when training goes on."""
    return {
        "inputs": stage_inputs(recipe, name),
        "data": data,
        "world_size": world_size(),
        "zero": recipe.sharding_of(recipe.stages[name]).zero if sharded else 0,
        "expert_parallel": ranks_of_experts(recipe, name, world_size()),
    }


def _resume_point(recipe: Recipe, name: str, stage_dir: Path, console: Console) -> Path | None:
    """Return the checkpoint to go on from; removes what interrupted writes left.

    Raises:
        ValueError: It was made with other options.
    """
    root = stage_dir / CHECKPOINTS
    if is_main_process():
        checkpoints.clean(root)
    found = checkpoints.latest(root)
    if found is None:
        return None
    marker = checkpoints.read_marker(found)
    assert marker is not None
    check_unchanged(marker["inputs"], recipe, name, str(stage_dir))
    if is_main_process():
        console.print(f"{name}: continuing from step {marker['step']}", highlight=False)
    return found


def _check_resume(checkpoint: Path, now: dict[str, Any], stage_dir: Path) -> None:
    """Refuse a checkpoint of other data or, sharded, of another number of processes.

    Raises:
        ValueError: It is one.
    """
    before = checkpoints.read_marker(checkpoint)
    assert before is not None
    if before["data"] != now["data"]:
        raise ValueError(
            f"the data changed since {checkpoint} was written: the same recipe now gives other rows. Restore the "
            f"data files, or delete {stage_dir} to train the stage anew"
        )
    if before.get("parent") != now.get("parent"):
        raise ValueError(
            f"{checkpoint} holds an adapter that was begun on other weights than those of its parent now; restore the "
            f"parent, or delete {stage_dir} to train the adapter anew"
        )
    if before["zero"] != now["zero"] or (now["zero"] and before["world_size"] != now["world_size"]):
        raise ValueError(
            f"{checkpoint} was written by {before['world_size']} processes under ZeRO-{before['zero']}, and cannot be "
            f"continued by {now['world_size']} under ZeRO-{now['zero']}; start as many as before, or delete {stage_dir}"
        )
    ranks = before.get("expert_parallel", 1)
    if ranks != now["expert_parallel"]:
        raise ValueError(
            f"{checkpoint} was written with expert_parallel: {ranks}, and cannot be continued with "
            f"{now['expert_parallel']}; set it as it was, or delete {stage_dir}"
        )


def save_output(trainer: VLMTrainer, recipe: Recipe, stage_dir: Path, start: Path | None = None) -> None:
    """Write the complete model, or its adapter, and the processor into a stage's directory; all ranks call it.

    The files are written beside and moved in at the end; the stage counts as finished only with `finish_stage`.
    """
    output = stage_dir / _OUTPUT
    if write_output(trainer, recipe, output, stage_dir, start):
        for file in output.iterdir():
            file.replace(stage_dir / file.name)
        output.rmdir()


def write_output(trainer: VLMTrainer, recipe: Recipe, output: Path, home: Path, start: Path | None = None) -> bool:
    """Write model, or adapter, and processor into a directory; all ranks call it.

    Args:
        trainer: Of the stage.
        recipe: The recipe.
        output: The directory; replaced where it is there.
        home: Where the files are moved to afterwards.
        start: What an adapter was trained on.

    Returns:
        Whether this rank wrote them.
    """
    from sparsevlm.adapters.attach import has_adapter, save_adapter

    model, state = trainer.vlm, None
    if trainer.expert_ranks > 1:
        state: Any = complete_state(model, main=trainer.args.should_save)
    elif trainer.is_deepspeed_enabled and has_adapter(model):
        state = adapter_tensors(model)
    elif trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers the shards, on every rank
    if trainer.is_deepspeed_enabled:
        # transformers' sharded loading notes renamings that it did not do, and saving would undo them.
        vars(model).pop("_weight_conversions", None)
    if not trainer.args.should_save:
        return False
    if recipe.model.dtype == "float16":
        state = _float16(state or model.state_dict())
    if output.exists():
        shutil.rmtree(output)
    if has_adapter(model):
        assert start is not None
        save_adapter(model, output, start, state, home=home)
    else:
        model.save_pretrained(output, state_dict=state)
        _declare_dtype(output / "config.json", recipe.model.dtype)
    trainer.processing_class.save_pretrained(output)  # pyright: ignore
    return True


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter's directory holds and nothing of the frozen weights, whole; all ranks call it."""
    beside = ("connector", "fusion")
    return gather_state(model, lambda name: is_adapter_parameter(name) or parts_of(name)[-1] in beside)


def _float16(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as they are saved in float16; counts, the routers' balance and adapters stay in their types."""
    import torch

    from sparsevlm.moe.router import KEEP_FLOAT32

    def rounded(name: str, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and not name.endswith(KEEP_FLOAT32) and not is_adapter_parameter(name)

    return {name: tensor.to(torch.float16) if rounded(name, tensor) else tensor for name, tensor in state.items()}


def _declare_dtype(config: Path, dtype: str) -> None:
    """Enter the weights' type in a saved configuration and those of its parts: the model trains in another."""
    document = json.loads(config.read_text(encoding="utf-8"))
    for part in (document, *(value for value in document.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = dtype
    config.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def finish_stage(
    recipe: Recipe,
    name: str,
    parent_dir: Path | None,
    stage_dir: Path,
    summary: StageSummary,
    reports: dict[str, Any],
) -> None:
    """Write what the stage was and its completion marker; then drop what was only needed to resume."""
    (stage_dir / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    record = {
        "stage": name,
        "finished": datetime.now(UTC).isoformat(timespec="microseconds"),
        "parent": None if parent_dir is None else {"stage": parent_dir.name, "finished": finished_at(parent_dir)},
        "processes": world_size(),
        "versions": versions(),
        "inputs": stage_inputs(recipe, name),
        "summary": summary.to_dict(),
        "evals": reports,
        "eval_specs": eval_specs(recipe, name),
    }
    checkpoints.write_atomically(stage_dir / STAGE_FILE, json.dumps(record, indent=2) + "\n")
    checkpoints.mark_complete(stage_dir, {"stage": name, "finished": record["finished"]})
    for leftover in (CHECKPOINTS, START):
        if (stage_dir / leftover).exists():
            shutil.rmtree(stage_dir / leftover)


def finished_at(stage_dir: Path) -> str:
    """Return when a complete stage was finished; tells it from an earlier run of the same stage."""
    return json.loads((stage_dir / STAGE_FILE).read_text(encoding="utf-8"))["finished"]


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
