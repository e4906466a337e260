"""Writes the snapshots of a stage that are uploaded while it goes on (`hub_snapshots`)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsevlm.recipe.load import dump_recipe
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.checkpoints import mark_complete
from sparsevlm.train.hub_snapshots import FOLDER, drop, found
from sparsevlm.train.summary import STAGE_FILE

if TYPE_CHECKING:
    from rich.console import Console

_METRICS = "metrics.jsonl"


def snapshots_of(
    trainer: Any,
    recipe: Recipe,
    name: str,
    stage_dir: Path,
    write: Callable[[Path, Path], bool],
    versions: dict[str, str],
    console: Console,
) -> HubSnapshots:
    """Return the callback of a stage; `write` is that of `HubSnapshots`, `versions` are those of packages."""

    def records(step: int) -> dict[str, str]:
        metrics = stage_dir / _METRICS
        return {
            "recipe.yaml": dump_recipe(recipe),
            STAGE_FILE: json.dumps({"stage": name, "step": step, "versions": versions}, indent=2) + "\n",
            _METRICS: metrics.read_text(encoding="utf-8") if metrics.is_file() else "",
        }

    def warn(text: str) -> None:
        console.print(f"{name}: {text}", highlight=False, markup=False)

    assert recipe.hub is not None
    chosen = recipe.hub.stages is None or name in recipe.hub.stages
    return HubSnapshots(recipe.hub.every if chosen else None, stage_dir, write, records, trainer.leave_out, warn)


class HubSnapshots(TrainerCallback):
    """Writes a snapshot every so many steps, but not at the last: the stage's own output follows.

    Args:
        every: Steps; None writes none.
        stage_dir: The stage's directory.
        write: Writes model and processor into a directory that is later renamed to another; every rank calls it, and
            it tells whether this one writes.
        records: Further files, name -> text.
        wrote: Told the seconds that it took.
        warn: Told what went wrong.
    """

    def __init__(
        self,
        every: int | None,
        stage_dir: Path,
        write: Callable[[Path, Path], bool],
        records: Callable[[int], dict[str, str]],
        wrote: Callable[[float], None],
        warn: Callable[[str], None],
    ) -> None:
        self.every, self.folder, self.stage_dir = every, stage_dir / FOLDER, stage_dir
        self.write, self.records, self.wrote, self.warn = write, records, wrote, warn

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write one if it is time."""
        step = state.global_step
        if self.every is None or step % self.every or step >= state.max_steps:
            return
        started = time.perf_counter()
        partial, final = self.folder / f".step-{step}.partial", self.folder / f"step-{step}"
        try:
            if args.should_save:
                for left in self.folder.glob(".*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
            if self.write(partial, final) and not final.exists():
                for name, text in self.records(step).items():
                    (partial / name).write_text(text, encoding="utf-8")
                mark_complete(partial, {"step": step})
                older = found(self.stage_dir, "step")
                partial.rename(final)
                for _, snapshot in older:
                    drop(snapshot)
        except (OSError, SafetensorError) as error:  # a full disk is either
            self.warn(f"step {step} was not written for the Hub: {error}")
        self.wrote(time.perf_counter() - started)
